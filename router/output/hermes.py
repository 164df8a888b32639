"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": ...}</tool_call>, one a call or with a list."""

from __future__ import annotations

from router.output.events import Content, OutputEvent
from router.output.marked_text import MarkedText
from router.output.tool_parser import CallsReader

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesCalls:
    markers = (BEGIN, END)

    def __init__(self) -> None:
        self._text = MarkedText()
        self._calls = CallsReader()
        self._is_inside = False

    def push(self, text: str) -> list[OutputEvent]:
        self._text.push(text)
        return self._read()

    def finish(self) -> list[OutputEvent]:
        self._text.end()
        return [*self._read(), *self._calls.finish()]

    def _read(self) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        marker: str | None = ""
        while marker is not None:
            text, marker = self._text.before(END if self._is_inside else BEGIN)
            events += self._read_calls(text) if self._is_inside else [Content(text)]
            if marker is not None:
                events += self._calls.finish()
                self._is_inside = not self._is_inside
        return events

    def _read_calls(self, text: str) -> list[OutputEvent]:
        """What is neither call nor separator is dropped: it was not meant to be read."""
        calls = self._calls
        return [
            event
            for char in text
            if not calls.is_between or calls.can_begin(char)
            for event in calls.push(char)
        ]
