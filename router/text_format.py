"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from router.answer_format import AnswerContext, CompletionFormat, merged
from router.choice import Choice, ChoiceDelta
from router.logprobs import TextLogprobs, joined, prompt_logprobs


class TextFormat(CompletionFormat):
    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, context: AnswerContext) -> None:
        super().__init__(context)
        num_choices = len(self._generation.sampling)
        self._logprobs_of = [TextLogprobs(self._tokenizer.token_bytes) for _ in range(num_choices)]
        self._is_opened = [False] * num_choices

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        """An echoed prompt goes out with the first tokens, which bring its logprobs."""
        if self._is_opened[choice.index] or not (
            self._generation.echoes or self._generation.returns_token_ids
        ):
            return super().chunk(choice, delta, choices)
        return self._event(self._choice(choice, delta), choices)

    def _plain_chunk(self, index: int, text: str) -> bytes:
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._plain_head,
            index,
            orjson.dumps(text),
        )

    def _chunk_choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any] | None:
        return self._choice(choice, delta) if delta.text or self._has_news(delta) else None

    def _whole_choice(self, choice: Choice, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        whole = merged(deltas)
        choice_json = self._choice(choice, whole)
        if self._generation.has_prompt_logprobs:
            tokens = whole.prompt_logprobs
            choice_json["prompt_logprobs"] = prompt_logprobs(tokens, self._tokenizer.token_bytes)
        return choice_json

    def _choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any]:
        is_first = not self._is_opened[choice.index]
        self._is_opened[choice.index] = True
        choice_json = {
            "index": choice.index,
            "text": self._echo(choice) + delta.text if is_first else delta.text,
            "logprobs": self._logprobs(choice, delta, is_first),
            "finish_reason": delta.finish_reason,
        }
        if is_first and self._generation.returns_token_ids:
            choice_json["prompt_token_ids"] = list(self._generation.prompts[choice.prompt_index].token_ids)
        return self._with_ends(choice_json, delta)

    def _echo(self, choice: Choice) -> str:
        if not self._generation.echoes:
            return ""
        prompt = self._generation.prompts[choice.prompt_index]
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _logprobs(self, choice: Choice, delta: ChoiceDelta, is_first: bool) -> dict[str, Any] | None:
        if not self._generation.has_logprobs:
            return None
        logprobs = self._logprobs_of[choice.index]
        parts = []
        if is_first and self._generation.echoes:
            prompt = self._generation.prompts[choice.prompt_index]
            parts.append(logprobs.prompt_entries(prompt.token_ids, delta.prompt_logprobs))
        parts.append(logprobs.entries(delta.logprobs))
        return joined(parts)
