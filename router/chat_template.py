"""Messages to prompt text, by the model's own Jinja template, in the environment Hugging Face gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from servicekit.errors import InvalidRequest

# Templates either write the arguments of earlier calls as they are, or dump them, which needs an object.
_DUMPS_ARGUMENTS = re.compile(r"arguments\s*\|\s*tojson")


class ChatTemplate:
    """Templates come with the model, so they run sandboxed; what they raise is the request's fault."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """jinja2.TemplateSyntaxError when `source` is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self.shows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        self.wants_argument_objects = _DUMPS_ARGUMENTS.search(source) is not None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. InvalidRequest when the template refuses the messages."""
        values = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        try:
            text = self._template.render(
                **{**values, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise InvalidRequest(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        return _cut_after(text, messages[-1]["content"]) if continue_final_message else text


def _cut_after(text: str, final_content: str) -> str:
    """Without what the template puts behind the last message, so that the model goes on inside it."""
    content = (final_content or "").strip()
    start = text.rfind(content) if content else -1
    if start < 0:
        raise InvalidRequest(
            "continue_final_message needs a last message whose text the chat template shows as it is",
            param="continue_final_message",
        )
    return text[: start + len(content)]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
