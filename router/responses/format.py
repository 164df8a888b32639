"""Answers of /v1/responses: a response object, or the events that build it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import orjson

from router.answer_format import Answer, AnswerContext, TokenCounts, merged
from router.choice import Choice, ChoiceDelta
from router.http_errors import error_body
from router.output.blocks import Block, BlockChange, Blocks
from router.output.rules import new_output
from router.responses.types import ResponsesRequest
from servicekit.errors import ServingError

_ID_PREFIXES = {"text": "msg", "reasoning": "rs", "tool": "fc"}


class ResponsesFormat:
    """One choice; its blocks are the output items."""

    def __init__(self, request: ResponsesRequest, context: AnswerContext) -> None:
        self._generation = context.generation
        self._output = new_output(context.generation.output)
        self._blocks = Blocks()
        self._num_events = 0
        self._finish_reason: str | None = None
        self._head = _head(request, context)

    def opening(self, choices: Sequence[Choice]) -> bytes:
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunk(self, choice: Choice, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        return b"".join([self._change(change) for change in self._take(delta)])

    def closing(self, choices: Sequence[Choice]) -> bytes:
        status = self._status()
        response = self._response(status, self._items(), self._usage(choices))
        return self._event(f"response.{status}", response=response)

    def failure(self, error: ServingError) -> bytes:
        body = error_body(error)["error"]
        response = self._response("failed", self._items())
        response["error"] = {"code": "server_error", "message": body["message"]}
        return self._event("response.failed", response=response)

    def whole(self, answers: Sequence[Answer]) -> bytes:
        self._take(merged(answers[0][1]))
        usage = self._usage([choice for choice, _ in answers])
        return _dumped(self._response(self._status(), self._items(), usage))

    def _take(self, delta: ChoiceDelta) -> list[BlockChange]:
        changes = self._blocks.take(self._output.push(delta.text, delta.token_ids))
        if delta.finish_reason:
            self._finish_reason = delta.finish_reason
            changes += self._blocks.take(self._output.finish())
            changes += self._blocks.end()
        return changes

    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _response(
        self, status: str, items: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "incomplete_details": details,
            "output": items,
            "usage": usage,
        }

    def _items(self) -> list[dict[str, Any]]:
        blocks = self._blocks.all
        status = self._status()
        return [_item(block, "completed" if block is not blocks[-1] else status) for block in blocks]

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        counts = TokenCounts.of(self._generation, choices)
        return {
            "input_tokens": counts.num_prompt,
            "input_tokens_details": {"cached_tokens": counts.num_cached, "cache_write_tokens": 0},
            "output_tokens": counts.num_completion,
            "output_tokens_details": {"reasoning_tokens": self._output.num_reasoning_tokens},
            "total_tokens": counts.num_prompt + counts.num_completion,
        }

    def _change(self, change: BlockChange) -> bytes:
        if change.kind == "open":
            return self._opened(change.block)
        if change.kind == "close":
            return self._closed(change.block)
        block = change.block
        name, extra = _PIECES[block.kind]
        return self._event(f"response.{name}.delta", delta=change.piece, **_place(block), **extra)

    def _opened(self, block: Block) -> bytes:
        item = _item(block, "in_progress", is_open=True)
        added = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "text":
            return added
        return added + self._event("response.content_part.added", part=_text_part(""), **_place(block))

    def _closed(self, block: Block) -> bytes:
        name, extra = _PIECES[block.kind]
        if block.kind == "tool":
            extra = {"arguments": block.text, "name": block.name}
        else:
            extra = {"text": block.text, **extra}
        done = self._event(f"response.{name}.done", **_place(block), **extra)
        if block.kind == "text":
            part = _text_part(block.text)
            done += self._event("response.content_part.done", part=part, **_place(block))
        item = _item(block, self._status())
        return done + self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, type: str, **fields: Any) -> bytes:
        data = _dumped({"type": type, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (type.encode(), data)


_PIECES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("output_text", {"logprobs": []}),
    "reasoning": ("reasoning_text", {}),
    "tool": ("function_call_arguments", {}),
}


def _dumped(data: dict[str, Any]) -> bytes:
    """The request is repeated in the answer, and may hold integers that orjson does not write."""
    try:
        return orjson.dumps(data)
    except TypeError:
        return json.dumps(data).encode()


def _head(request: ResponsesRequest, context: AnswerContext) -> dict[str, Any]:
    """What does not change while the answer grows."""
    asked = request.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{context.request_id}",
        "object": "response",
        "created_at": int(time.time()),
        "model": context.model,
        "error": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": asked.get("reasoning", {"effort": None, "summary": None}),
        "store": False,
        "temperature": request.temperature,
        "text": asked.get("text", {"format": {"type": "text"}}),
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": [{"strict": None, "parameters": None, **tool} for tool in asked.get("tools", [])],
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _place(block: Block) -> dict[str, Any]:
    place: dict[str, Any] = {"item_id": _item_id(block), "output_index": block.index}
    return place if block.kind == "tool" else {**place, "content_index": 0}


def _item_id(block: Block) -> str:
    return f"{_ID_PREFIXES[block.kind]}_{block.id}"


def _item(block: Block, status: str, *, is_open: bool = False) -> dict[str, Any]:
    item: dict[str, Any] = {"id": _item_id(block), "status": status}
    if block.kind == "tool":
        arguments = "" if is_open else block.text
        call = {"type": "function_call", "call_id": block.call_id, "name": block.name}
        return {**item, **call, "arguments": arguments}
    if block.kind == "reasoning":
        content = [] if is_open else [{"type": "reasoning_text", "text": block.text}]
        return {**item, "type": "reasoning", "summary": [], "content": content}
    content = [] if is_open else [_text_part(block.text)]
    return {**item, "type": "message", "role": "assistant", "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
