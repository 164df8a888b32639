"""The bodies of /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from router.api_types import MAX_STOPS, Finite, SharedFields, StopText
from router.tool_types import MAX_TOOLS, ToolName


class _MessagesModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextBlock(_MessagesModel):
    type: Literal["text"]
    text: str


class ToolUseBlock(_MessagesModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_MessagesModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(_MessagesModel):
    """Of an earlier turn; models do not see it again."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    Field(discriminator="type"),
]


class InputMessage(_MessagesModel):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class MessagesTool(_MessagesModel):
    """Tools that a server runs have another type, and are refused."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]


class MessagesToolChoice(_MessagesModel):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_MessagesModel):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(_MessagesModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_MessagesModel):
    effort: Annotated[str, StringConstraints(max_length=32)] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(_MessagesModel):
    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, SharedFields):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    metadata: dict[str, Any] | None = None  # no effect
