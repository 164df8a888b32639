"""Answers in OpenAI's JSON: chunks of a stream, or the whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from router.choice import Choice, ChoiceDelta
from router.generation import Generation
from router.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def sse_event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class AnswerFormat:
    """What both endpoints share. One object a request; subclasses say what a choice looks like."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, generation: Generation, tokenizer: Tokenizer, request_id: str, model: str) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{request_id}",
            "object": self.chunk_object if generation.streams else self.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        self._plain_head = b"data: " + orjson.dumps(self._head)[:-1]
        is_plain = not (generation.has_logprobs or generation.returns_token_ids)
        self._streams_plain_text = is_plain and not generation.has_continuous_usage

    def opening(self, choice: Choice) -> bytes:
        """What a choice's stream begins with; may be empty."""
        raise NotImplementedError

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        """Empty when there is nothing to tell, as for half a character."""
        if self._streams_plain_text and not delta.finish_reason:
            return self._plain_chunk(choice.index, delta.text) if delta.text else b""
        has_news = delta.text or delta.finish_reason or self._generation.has_logprobs
        if not has_news and not self._generation.returns_token_ids:
            return b""
        return self._event(self._chunk_choice(choice, delta), choices)

    def usage_chunk(self, choices: Sequence[Choice]) -> bytes:
        return sse_event({**self._head, "choices": [], "usage": self.usage(choices)})

    def whole(self, answers: Sequence[tuple[Choice, list[ChoiceDelta]]]) -> bytes:
        choices = [choice for choice, _ in answers]
        body: dict[str, Any] = {
            **self._head,
            "choices": [self._whole_choice(choice, deltas) for choice, deltas in answers],
            "usage": self.usage(choices),
        }
        return orjson.dumps(body)

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        prompts = self._generation.prompts
        num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
        num_completion = sum(choice.num_tokens for choice in choices)
        num_cached = sum(choice.num_hit_tokens for choice in choices[:: self._generation.num_choices])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _event(self, choice_json: dict[str, Any], choices: Sequence[Choice]) -> bytes:
        event = {**self._head, "choices": [choice_json]}
        if self._generation.has_continuous_usage:
            event["usage"] = self.usage(choices)
        return sse_event(event)

    def _with_ends(self, choice_json: dict[str, Any], delta: ChoiceDelta) -> dict[str, Any]:
        if self._generation.returns_token_ids:
            choice_json["token_ids"] = delta.token_ids
        if delta.finish_reason:
            choice_json["stop_reason"] = delta.stop_reason
        return choice_json

    def _plain_chunk(self, index: int, text: str) -> bytes:
        raise NotImplementedError

    def _chunk_choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, choice: Choice, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        raise NotImplementedError


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
