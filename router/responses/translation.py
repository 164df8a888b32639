"""A request of the Responses API as the chat request that it means."""

from __future__ import annotations

from router.api_types import CalledFunction, CalledTool, ChatMessage, ChatRequest, shared_fields
from router.responses.types import (
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputText,
    NamedFunction,
    ResponsesRequest,
    TextFormatField,
)
from router.structure_types import JsonSchemaFormat, ResponseFormat
from router.tool_types import FunctionName, FunctionTool, NamedTool, Tool, ToolChoice
from servicekit.errors import InvalidRequest


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """InvalidRequest for what needs stored answers."""
    _refuse_unsupported(request)
    text_format = request.text.format if request.text else None
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream,
        tools=_tools(request),
        tool_choice=_tool_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(text_format),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        **shared_fields(request),
    )


def _refuse_unsupported(request: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise InvalidRequest(
                f"{name}: this server stores no responses; send the whole conversation as input",
                param=name,
                code="unsupported_parameter",
            )
    for name in ("background", "prompt", "top_logprobs"):
        if getattr(request, name):
            raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    messages = []
    if request.instructions is not None:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*messages, ChatMessage(role="user", content=request.input)]
    for item in request.input:
        _append(messages, item)
    if not messages:
        raise InvalidRequest("input: there is no message", param="input")
    return messages


def _append(messages: list[ChatMessage], item: InputItem) -> None:
    """Calls join the assistant's message before them."""
    if isinstance(item, InputMessage):
        messages.append(ChatMessage(role=item.role, content=_text(item.content)))
    elif isinstance(item, InputCallOutput):
        messages.append(
            ChatMessage.model_validate(
                {"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id}
            )
        )
    elif isinstance(item, InputCall):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = CalledTool.model_validate({"id": item.call_id, "type": "function", "function": function})
        if not messages or messages[-1].role != "assistant":
            messages.append(ChatMessage(role="assistant"))
        messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]


def _text(content: str | list[InputText]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal for part in content)


def _tools(request: ResponsesRequest) -> list[Tool] | None:
    if request.tools is None:
        return None
    return [
        Tool(
            type="function",
            function=FunctionTool(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            ),
        )
        for tool in request.tools
    ]


def _tool_choice(request: ResponsesRequest) -> ToolChoice | None:
    choice = request.tool_choice
    if not isinstance(choice, NamedFunction):
        return choice
    return NamedTool(type="function", function=FunctionName(name=choice.name))


def _response_format(given: TextFormatField | None) -> ResponseFormat | None:
    if given is None:
        return None
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    return ResponseFormat(
        type="json_schema", json_schema=JsonSchemaFormat(name=given.name, schema=given.schema_)
    )
