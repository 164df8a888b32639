"""A request of the Messages API as the chat request that it means."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from router.api_types import CalledFunction, CalledTool, ChatMessage, ChatRequest, shared_fields
from router.messages.types import (
    Block,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from router.structure_types import JsonSchemaFormat, ResponseFormat
from router.tool_types import FunctionName, FunctionTool, NamedTool, Tool, ToolChoice
from servicekit.errors import InvalidRequest


class MessagesChat(ChatRequest):
    """max_tokens is required there, so that clients send a large one: it is an upper limit."""

    cuts_max_tokens: ClassVar[bool] = True


def chat_request(request: MessagesRequest) -> ChatRequest:
    return MessagesChat(
        **_prompt_fields(request),
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        **shared_fields(request),
    )


def prompt_request(request: CountTokensRequest) -> ChatRequest:
    """With everything that enters the prompt."""
    return ChatRequest(**_prompt_fields(request))


def _prompt_fields(request: CountTokensRequest) -> dict[str, Any]:
    choice = request.tool_choice
    is_serial = choice is not None and choice.disable_parallel_tool_use
    output = request.output_config
    return {
        "model": request.model,
        "messages": _messages(request),
        "tools": _tools(request),
        "tool_choice": _tool_choice(request),
        "parallel_tool_calls": False if is_serial else None,
        "chat_template_kwargs": _template_variables(request),
        "reasoning_effort": output.effort if output else None,
        "response_format": _response_format(request),
    }


def _messages(request: CountTokensRequest) -> list[ChatMessage]:
    messages = []
    if request.system:
        messages.append(ChatMessage(role="system", content=_text(request.system)))
    for message in request.messages:
        if isinstance(message.content, str):
            messages.append(ChatMessage(role=message.role, content=message.content))
        else:
            messages += _of_blocks(message.role, message.content)
    return messages


def _of_blocks(role: Literal["user", "assistant"], blocks: list[Block]) -> list[ChatMessage]:
    """Results of tools are messages of their own, before the text beside them."""
    text = "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    results = [_result(block) for block in blocks if isinstance(block, ToolResultBlock)]
    if role == "assistant":
        if results:
            raise InvalidRequest("tool_result belongs into a user message", param="messages")
        return [
            ChatMessage(
                role="assistant", content=text or ("" if not calls else None), tool_calls=calls or None
            )
        ]
    if calls:
        raise InvalidRequest("tool_use belongs into an assistant message", param="messages")
    has_text = bool(text) or not results
    return [*results, *([ChatMessage(role="user", content=text)] if has_text else [])]


def _call(block: ToolUseBlock) -> CalledTool:
    function = CalledFunction(name=block.name, arguments=block.input)
    return CalledTool.model_validate({"id": block.id, "type": "function", "function": function})


def _result(block: ToolResultBlock) -> ChatMessage:
    text = _text(block.content or "")
    content = f"Error: {text}" if block.is_error else text
    return ChatMessage.model_validate({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tools(request: CountTokensRequest) -> list[Tool] | None:
    if request.tools is None:
        return None
    return [
        Tool(
            type="function",
            function=FunctionTool(name=tool.name, description=tool.description, parameters=tool.input_schema),
        )
        for tool in request.tools
    ]


def _tool_choice(request: CountTokensRequest) -> ToolChoice | None:
    choice = request.tool_choice
    if choice is None or choice.type == "auto":
        return None
    if choice.type == "none":
        return "none"
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise InvalidRequest("tool_choice: type tool needs a name", param="tool_choice")
    return NamedTool(type="function", function=FunctionName(name=choice.name))


def _template_variables(request: CountTokensRequest) -> dict[str, Any] | None:
    """Both names are in use: Qwen's and DeepSeek's."""
    if request.thinking is None:
        return None
    thinks = request.thinking.type != "disabled"
    return {"enable_thinking": thinks, "thinking": thinks}


def _response_format(request: CountTokensRequest) -> ResponseFormat | None:
    output = request.output_config
    if output is None or output.format is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=output.format.schema_))
