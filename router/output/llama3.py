"""Llama 3: {"name": ..., "parameters": ...}, perhaps after <|python_tag|>, several with ; between them.

A JSON answer looks alike, so only the name of a tool of this request makes an object a call.
"""

from __future__ import annotations

from router.output.events import Content, OutputEvent
from router.output.marked_text import MarkedText
from router.output.tool_parser import CallsReader

PYTHON_TAG = "<|python_tag|>"


class Llama3Calls:
    markers = (PYTHON_TAG,)

    def __init__(self, names: frozenset[str]) -> None:
        self._text = MarkedText()
        self._calls = CallsReader(names, separators=";,")
        self._is_opened = False
        self._is_content = False

    def push(self, text: str) -> list[OutputEvent]:
        if self._is_content:
            return [Content(text)]
        self._text.push(text)
        return self._read()

    def finish(self) -> list[OutputEvent]:
        self._text.end()
        return [*self._read(), *self._calls.finish()]

    def _read(self) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        if not self._is_opened:
            events.append(Content(self._text.take_space()))
            has_tag = self._text.starts_with(PYTHON_TAG)
            if has_tag is None or self._text.is_empty:
                return events
            self._is_opened = True
            if has_tag:
                self._text.take(0, len(PYTHON_TAG))
        return events + self._read_calls(self._text.take_all())

    def _read_calls(self, text: str) -> list[OutputEvent]:
        """After the first thing that is no call everything is content."""
        events: list[OutputEvent] = []
        for place, char in enumerate(text):
            if self._calls.is_between and not self._calls.can_begin(char):
                self._is_content = True
                return [*events, Content(text[place:])]
            new = self._calls.push(char)
            events += new
            if any(isinstance(event, Content) for event in new):
                self._is_content = True
                return [*events, Content(text[place + 1 :])]
        return events
