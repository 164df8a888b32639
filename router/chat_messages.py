"""Messages of a request as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

from router.api_types import CalledTool, ChatMessage
from servicekit.errors import InvalidRequest


def template_message(message: ChatMessage, *, wants_argument_objects: bool) -> dict[str, Any]:
    """InvalidRequest for a message without content that is not an assistant's call."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"a {message.role} message needs content", param="messages")
    result: dict[str, Any] = {**(message.model_extra or {}), "role": message.role, "content": content}
    if message.tool_calls:
        result["tool_calls"] = [_called(call, wants_argument_objects) for call in message.tool_calls]
    return result


def _called(call: CalledTool, wants_objects: bool) -> dict[str, Any]:
    function = call.function
    arguments: Any = function.arguments
    if wants_objects and isinstance(arguments, str):
        arguments = _parsed(arguments)
    elif not wants_objects and not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    called = {**(function.model_extra or {}), "name": function.name, "arguments": arguments}
    return {"type": "function", **(call.model_extra or {}), "function": called}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the arguments of a tool call are not valid JSON", param="messages") from error
