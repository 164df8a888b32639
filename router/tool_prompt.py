"""Tools for models whose chat template does not show them: they are described in the system message.

DeepSeek's templates, for example, write earlier calls and their results but leave the description to the
caller; others know nothing of tools, and see calls and results as plain text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from router.output.deepseek import BEGIN_CALL, BEGIN_CALLS, END_CALL, END_CALLS, SEPARATOR
from router.output.rules import ToolParserName
from router.tool_types import Tool

_INSTRUCTIONS = (
    "You can call functions to help with the request. These are their signatures, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call functions, answer in exactly this form, with the name of a function for NAME and a JSON object "
    "of arguments for ARGUMENTS:\n{form}"
)
_HERMES_FORM = '<tool_call>{"name": "NAME", "arguments": ARGUMENTS}</tool_call>'
_LLAMA3_FORM = '{"name": "NAME", "parameters": ARGUMENTS}'
_DEEPSEEK_V3_CALL = f"{BEGIN_CALL}function{SEPARATOR}NAME\n```json\nARGUMENTS\n```{END_CALL}"
_DEEPSEEK_CALL = f"{BEGIN_CALL}NAME{SEPARATOR}ARGUMENTS{END_CALL}"


@dataclass(frozen=True, slots=True)
class ToolPrompt:
    form: str  # of a call
    template_writes_calls: bool  # of earlier turns, and their results

    @classmethod
    def of(cls, chat_template: str, parser: ToolParserName) -> ToolPrompt:
        """Asks for the form that `parser` reads."""
        form = _LLAMA3_FORM if parser == "llama3" else _HERMES_FORM
        if parser == "deepseek":
            call = _DEEPSEEK_V3_CALL if "```json" in chat_template else _DEEPSEEK_CALL
            form = f"{BEGIN_CALLS}{call}{END_CALLS}"
        return cls(form, "tool_calls" in chat_template)

    def added_to(self, messages: list[dict[str, Any]], tools: list[Tool]) -> list[dict[str, Any]]:
        lines = "\n".join(json.dumps(tool.model_dump(exclude_none=True)) for tool in tools)
        prompt = _INSTRUCTIONS.format(tools=lines, form=self.form)
        rest = messages if self.template_writes_calls else [self._as_text(message) for message in messages]
        if rest and rest[0]["role"] in ("system", "developer"):
            prompt = f"{rest[0]['content']}\n\n{prompt}"
            rest = rest[1:]
        return [{"role": "system", "content": prompt}, *rest]

    def _as_text(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] in ("tool", "function"):
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if not message.get("tool_calls"):
            return message
        calls = [self._written(call["function"]) for call in message["tool_calls"]]
        return {"role": message["role"], "content": (message.get("content") or "") + "\n".join(calls)}

    def _written(self, function: dict[str, Any]) -> str:
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return self.form.replace("NAME", function["name"], 1).replace("ARGUMENTS", text, 1)
