"""Answers of /v1/messages: a message, or the events that build it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from router.answer_format import Answer, AnswerContext, TokenCounts, merged
from router.choice import Choice, ChoiceDelta
from router.http_errors import error_status
from router.output.blocks import Block, BlockChange, Blocks
from router.output.rules import new_output
from servicekit.errors import ServingError

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "tool": ("input_json_delta", "partial_json"),
}


def messages_error_body(error: ServingError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(error_status(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error) or "the server failed"}}


class MessagesFormat:
    """One choice; its blocks are the content."""

    def __init__(self, context: AnswerContext) -> None:
        self._generation = context.generation
        self._output = new_output(context.generation.output)
        self._blocks = Blocks()
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._head = {
            "id": f"msg_{context.request_id}",
            "type": "message",
            "role": "assistant",
            "model": context.model,
        }

    def opening(self, choices: Sequence[Choice]) -> bytes:
        message = {**self._message([]), "usage": {**self._usage(choices), "output_tokens": 0}}
        return _event("message_start", message=message)

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        return b"".join([_change(change) for change in self._take(delta)])

    def closing(self, choices: Sequence[Choice]) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        ended = _event("message_delta", delta=delta, usage=self._usage(choices))
        return ended + _event("message_stop")

    def failure(self, error: ServingError) -> bytes:
        return _event("error", error=messages_error_body(error)["error"])

    def whole(self, answers: Sequence[Answer]) -> bytes:
        self._take(merged(answers[0][1]))
        message = self._message([_block(block, block.text) for block in self._blocks.all])
        return orjson.dumps({**message, "usage": self._usage([choice for choice, _ in answers])})

    def _take(self, delta: ChoiceDelta) -> list[BlockChange]:
        changes = self._blocks.take(self._output.push(delta.text, delta.token_ids))
        if delta.finish_reason:
            changes += self._blocks.take(self._output.finish())
            changes += self._blocks.end()
            self._end(delta)
        return changes

    def _end(self, delta: ChoiceDelta) -> None:
        if delta.finish_reason == "length":
            self._stop_reason = "max_tokens"
        elif self._output.num_calls:
            self._stop_reason = "tool_use"
        elif isinstance(delta.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", delta.stop_reason
        else:
            self._stop_reason = "end_turn"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        ends = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return {**self._head, "content": content, **ends}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """input_tokens are those that were not cached."""
        counts = TokenCounts.of(self._generation, choices)
        return {
            "input_tokens": counts.num_prompt - counts.num_cached,
            "cache_read_input_tokens": counts.num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts.num_completion,
        }


def _change(change: BlockChange) -> bytes:
    block = change.block
    if change.kind == "open":
        return _event("content_block_start", index=block.index, content_block=_block(block, ""))
    if change.kind == "close":
        return _event("content_block_stop", index=block.index)
    kind, field = _DELTAS[block.kind]
    return _event("content_block_delta", index=block.index, delta={"type": kind, field: change.piece})


def _block(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "tool":
        call_id = block.call_id.replace("call_", "toolu_", 1)
        return {"type": "tool_use", "id": call_id, "name": block.name, "input": _input(text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _input(arguments: str) -> Any:
    """An object, or what there is of one when the answer was cut."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))
