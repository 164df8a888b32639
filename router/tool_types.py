"""Tools and tool choice as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_TOOLS = 128

ToolName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class _ToolModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class FunctionTool(_ToolModel):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; none: no arguments
    strict: bool | None = None


class Tool(_ToolModel):
    type: Literal["function"]
    function: FunctionTool


class FunctionName(_ToolModel):
    name: ToolName


class NamedTool(_ToolModel):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
