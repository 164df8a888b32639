"""What one chat request may call, and the grammar that makes it call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from router.structure import Structure
from router.tool_types import NamedTool, Tool, ToolChoice
from servicekit.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    mode: Literal["auto", "required", "named"]
    tools: tuple[Tool, ...]  # never empty; one when named
    allows_parallel: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.tools)

    def structure(self) -> Structure | None:
        """What the answer must look like; None when the model may say what it likes."""
        if self.mode == "auto":
            return None
        schema = _schema(self.tools[0]) if self.mode == "named" else self._list_schema()
        return Structure(kind="json_schema", text=json.dumps(schema), is_compact=True)

    def _list_schema(self) -> dict[str, Any]:
        """Of the list that router/output/forced_calls.py reads."""
        definitions, calls = {}, []
        for place, tool in enumerate(self.tools):
            pointer = f"#/$defs/tool{place}"
            definitions[f"tool{place}"] = _moved(_schema(tool), pointer)
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": pointer}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        most = {} if self.allows_parallel else {"maxItems": 1}
        return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, "$defs": definitions}


def read_tool_use(
    tools: list[Tool] | None, choice: ToolChoice | None, parallel_tool_calls: bool | None
) -> ToolUse | None:
    """None when nothing may be called. InvalidRequest for a choice that the tools do not have."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: two tools have the same name", param="tools")
    if choice == "none":
        return None
    allows_parallel = parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise InvalidRequest(
                f"tool_choice: no tool is named {choice.function.name!r}", param="tool_choice"
            )
        return ToolUse(mode="named", tools=tuple(chosen), allows_parallel=False)
    mode: Literal["auto", "required"] = "required" if choice == "required" else "auto"
    return ToolUse(mode=mode, tools=tuple(tools), allows_parallel=allows_parallel)


def _schema(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, pointer: str) -> Any:
    """`schema` with references that hold when it lies at `pointer`."""
    if isinstance(schema, list):
        return [_moved(item, pointer) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: pointer + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, pointer)
        for key, value in schema.items()
    }
