"""Splits what a model thinks, between <think> and </think>, from what it says.

The life of a split:
1. Opening: the answer may begin with <think>, after whitespace. Skipped when the prompt ended with it.
2. Thinking: everything up to </think>, without whitespace around it.
3. Saying: the rest as it is, without the newlines that follow </think>.
"""

from __future__ import annotations

from typing import Literal

from router.output.events import Content, OutputEvent, Reasoning
from router.output.marked_text import MarkedText

THINK, END_THINK = "<think>", "</think>"

_State = Literal["opening", "thinking", "after", "saying"]


class ReasoningSplit:
    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the answer begins inside a thought."""
        self._state: _State = "thinking" if is_open else "opening"
        self._text = MarkedText()
        self._has_thought = False  # something other than whitespace
        self._space = ""  # of the thought, shown only when more of it follows

    @property
    def is_thinking(self) -> bool:
        return self._state == "thinking"

    def push(self, text: str) -> list[OutputEvent]:
        if self._state == "saying":
            return [Content(text)]
        self._text.push(text)
        return self._read()

    def finish(self) -> list[OutputEvent]:
        self._text.end()
        return self._read()

    def _read(self) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        if self._state == "opening":
            events += self._open()
        if self._state == "thinking":
            text, marker = self._text.before(END_THINK)
            events.append(Reasoning(self._thought(text)))
            if marker is not None:
                self._state = "after"
        if self._state == "after":
            self._text.take_space()
            if not self._text.is_empty:
                self._state = "saying"
        if self._state == "saying":
            events.append(Content(self._text.take_all()))
        return events

    def _open(self) -> list[OutputEvent]:
        self._space += self._text.take_space()
        is_opened = self._text.starts_with(THINK)
        if is_opened is None:
            return []
        space, self._space = self._space, ""
        if not is_opened:
            self._state = "saying"
            return [Content(space)]
        self._text.take(0, len(THINK))
        self._state = "thinking"
        return []

    def _thought(self, text: str) -> str:
        """`text` with the whitespace that was held back, without its own at the end."""
        if not self._has_thought:
            text = text.lstrip()
        shown = text.rstrip()
        if not shown:
            self._space += text
            return ""
        self._has_thought = True
        space, self._space = self._space, text[len(shown) :]
        return space + shown
