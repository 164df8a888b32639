"""The body of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from router.api_types import MAX_TEMPERATURE, Finite, SharedFields
from router.tool_types import MAX_TOOLS, ToolName


class _ResponsesModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class InputText(_ResponsesModel):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""
    refusal: str = ""


class InputMessage(_ResponsesModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class InputCall(_ResponsesModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(_ResponsesModel):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class InputReasoning(_ResponsesModel):
    """Of an earlier turn; models do not see it again."""

    type: Literal["reasoning"]


def _item_type(item: Any) -> str | None:
    if isinstance(item, dict):
        given = item.get("type", "message")
        return given if isinstance(given, str) else None
    return getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_item_type),
]


class ResponsesTool(_ResponsesModel):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_ResponsesModel):
    type: Literal["function"]
    name: ToolName


class TextFormatField(_ResponsesModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextField(_ResponsesModel):
    format: TextFormatField | None = None


class ReasoningField(_ResponsesModel):
    effort: Annotated[str, StringConstraints(max_length=32)] | None = None


class ResponsesRequest(_ResponsesModel, SharedFields):
    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextField | None = None
    reasoning: ReasoningField | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # too long is refused either way
    store: bool | None = None  # nothing is
    user: str | None = None  # no effect
    # Refused: they need answers that were stored, or more than one model call.
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    top_logprobs: int | None = None
