"""Answers as bytes: events of a stream, or the whole. One object a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from router.best_of import shown_answers
from router.choice import Choice, ChoiceDelta
from router.generation import Generation
from router.http_errors import error_body
from router.tokenizer import Tokenizer
from servicekit.errors import ServingError

DONE = b"data: [DONE]\n\n"

Answer = tuple[Choice, list[ChoiceDelta]]


def sse_event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class AnswerFormat(Protocol):
    def opening(self, choices: Sequence[Choice]) -> bytes:
        """What the stream begins with; goes out with the first tokens. May be empty, as all below."""
        ...

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        """Empty when there is nothing to tell, as for half a character."""
        ...

    def closing(self, choices: Sequence[Choice]) -> bytes: ...

    def failure(self, error: ServingError) -> bytes:
        """The end of a stream that cannot go on."""
        ...

    def whole(self, answers: Sequence[Answer]) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerContext:
    """What every format writes from."""

    generation: Generation
    tokenizer: Tokenizer
    request_id: str
    model: str
    reasoning_fields: tuple[str, ...] = ()  # names under which chat answers show what was thought


class CompletionFormat:
    """What chat and text completions share; subclasses say what a choice looks like."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, context: AnswerContext) -> None:
        generation = self._generation = context.generation
        self._tokenizer = context.tokenizer
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{context.request_id}",
            "object": self.chunk_object if generation.streams else self.whole_object,
            "created": int(time.time()),
            "model": context.model,
        }
        self._plain_head = b"data: " + orjson.dumps(self._head)[:-1]
        is_plain = not (generation.has_logprobs or generation.returns_token_ids or generation.output)
        self._streams_plain_text = is_plain and not generation.has_continuous_usage

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        if self._streams_plain_text and not delta.finish_reason:
            return self._plain_chunk(choice.index, delta.text) if delta.text else b""
        choice_json = self._chunk_choice(choice, delta)
        return b"" if choice_json is None else self._event(choice_json, choices)

    def closing(self, choices: Sequence[Choice]) -> bytes:
        if not self._generation.includes_usage:
            return DONE
        return sse_event({**self._head, "choices": [], "usage": self.usage(choices)}) + DONE

    def failure(self, error: ServingError) -> bytes:
        return sse_event(error_body(error)) + DONE

    def whole(self, answers: Sequence[Answer]) -> bytes:
        shown = [
            self._whole_choice(choice, deltas) for choice, deltas in shown_answers(self._generation, answers)
        ]
        usage = self.usage([choice for choice, _ in answers])
        return orjson.dumps({**self._head, "choices": shown, "usage": usage})

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        counts = TokenCounts.of(self._generation, choices)
        return {
            "prompt_tokens": counts.num_prompt,
            "completion_tokens": counts.num_completion,
            "total_tokens": counts.num_prompt + counts.num_completion,
            "prompt_tokens_details": {"cached_tokens": counts.num_cached},
        }

    def _event(self, choice_json: dict[str, Any], choices: Sequence[Choice]) -> bytes:
        event = {**self._head, "choices": [choice_json]}
        if self._generation.has_continuous_usage:
            event["usage"] = self.usage(choices)
        return sse_event(event)

    def _has_news(self, delta: ChoiceDelta) -> bool:
        """Beside text."""
        generation = self._generation
        return bool(delta.finish_reason) or generation.has_logprobs or generation.returns_token_ids

    def _with_ends(self, choice_json: dict[str, Any], delta: ChoiceDelta) -> dict[str, Any]:
        if self._generation.returns_token_ids:
            choice_json["token_ids"] = delta.token_ids
        if delta.finish_reason:
            choice_json["stop_reason"] = delta.stop_reason
        return choice_json

    def _plain_chunk(self, index: int, text: str) -> bytes:
        raise NotImplementedError

    def _chunk_choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any] | None:
        """None when there is nothing to tell."""
        raise NotImplementedError

    def _whole_choice(self, choice: Choice, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TokenCounts:
    num_prompt: int
    num_completion: int
    num_cached: int  # of the prompt

    @classmethod
    def of(cls, generation: Generation, choices: Sequence[Choice]) -> TokenCounts:
        return cls(
            num_prompt=sum(len(prompt.token_ids) for prompt in generation.prompts),
            num_completion=sum(choice.num_tokens for choice in choices),
            num_cached=sum(choice.num_hit_tokens for choice in choices[:: generation.num_choices]),
        )


def merged(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    last = deltas[-1]
    return ChoiceDelta(
        text="".join([delta.text for delta in deltas]),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[token for delta in deltas for token in delta.logprobs],
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), ()),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
