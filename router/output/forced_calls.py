"""Answers that a grammar has made tool calls: tool_choice "required", or one function by name."""

from __future__ import annotations

from router.output.events import OutputEvent, ToolArguments, ToolStart
from router.output.tool_parser import CallsReader


class RequiredCalls:
    """A JSON list of {"name": ..., "parameters": ...}."""

    markers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._calls = CallsReader()

    def push(self, text: str) -> list[OutputEvent]:
        calls = self._calls
        return [
            event
            for char in text
            if not calls.is_between or calls.can_begin(char)
            for event in calls.push(char)
        ]

    def finish(self) -> list[OutputEvent]:
        return self._calls.finish()


class NamedCall:
    """The whole answer is the arguments."""

    markers: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_started = False

    def push(self, text: str) -> list[OutputEvent]:
        start = [] if self._is_started else [ToolStart(0, self._name)]
        self._is_started = True
        return [*start, ToolArguments(0, text)]

    def finish(self) -> list[OutputEvent]:
        return []
