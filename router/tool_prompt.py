"""Tools for models whose chat template knows none: described in the system message, in Hermes' format."""

from __future__ import annotations

import json
from typing import Any

from router.tool_types import Tool

_INSTRUCTIONS = (
    "You can call functions to help with the request. These are their signatures, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call a function, answer with its name and arguments inside tags, once for each call:\n"
    '<tool_call>{{"name": "function name", "arguments": {{"argument": "value"}}}}</tool_call>'
)


def with_tool_prompt(messages: list[dict[str, Any]], tools: list[Tool]) -> list[dict[str, Any]]:
    """`messages` with the tools in the system message, and earlier calls and results as plain text."""
    lines = "\n".join(json.dumps(tool.model_dump(exclude_none=True)) for tool in tools)
    prompt = _INSTRUCTIONS.format(tools=lines)
    rest = [_as_text(message) for message in messages]
    if rest and rest[0]["role"] in ("system", "developer"):
        first = rest.pop(0)
        prompt = f"{first['content']}\n\n{prompt}"
    return [{"role": "system", "content": prompt}, *rest]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"]) for call in message["tool_calls"]]
    text = "\n".join(f"<tool_call>{call}</tool_call>" for call in calls)
    return {"role": message["role"], "content": f"{message.get('content') or ''}{text}"}
