"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from router.answer_format import AnswerFormat, merged, sse_event
from router.choice import Choice, ChoiceDelta
from router.logprobs import chat_logprobs


class ChatFormat(AnswerFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, choice: Choice) -> bytes:
        """The role alone, so that nobody takes it for the first token."""
        choice_json: dict[str, Any] = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
        choice_json |= {"logprobs": None, "finish_reason": None}
        event = {**self._head, "choices": [choice_json]}
        if self._generation.returns_token_ids:
            event["prompt_token_ids"] = self._generation.prompts[choice.prompt_index].token_ids
        return sse_event(event)

    def whole(self, answers: Sequence[tuple[Choice, list[ChoiceDelta]]]) -> bytes:
        if self._generation.returns_token_ids:
            self._head["prompt_token_ids"] = self._generation.prompts[0].token_ids
        return super().whole(answers)

    def _plain_chunk(self, index: int, text: str) -> bytes:
        return (
            b'%b,"choices":[{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}\n\n'
            % (
                self._plain_head,
                index,
                orjson.dumps(text),
            )
        )

    def _chunk_choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any]:
        choice_json = {
            "index": choice.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs([delta]),
            "finish_reason": delta.finish_reason,
        }
        return self._with_ends(choice_json, delta)

    def _whole_choice(self, choice: Choice, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        choice_json = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas)},
            "logprobs": self._logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }
        return self._with_ends(choice_json, merged(deltas))

    def _logprobs(self, deltas: list[ChoiceDelta]) -> dict[str, Any] | None:
        if not self._generation.has_logprobs:
            return None
        tokens = [token for delta in deltas for token in delta.logprobs]
        return chat_logprobs(tokens, self._tokenizer.token_bytes)
