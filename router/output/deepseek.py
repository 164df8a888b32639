"""DeepSeek's tool calls, between special tokens; V3 and R1 name the type first, V3.1 the tool at once.

V3, R1: <begin of calls><begin of call>function<sep>NAME, a newline, the arguments in a json code block,
<end of call> ... <end of calls>. V3.1: <begin of call>NAME<sep>ARGUMENTS<end of call>.
"""

from __future__ import annotations

from collections.abc import Callable

from router.output.events import Content, OutputEvent, ToolArguments, ToolStart
from router.output.json_call import JsonObject
from router.output.marked_text import MarkedText

BEGIN_CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN_CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"


class DeepseekCalls:
    markers = (BEGIN_CALLS, END_CALLS, BEGIN_CALL, END_CALL, SEPARATOR)

    def __init__(self) -> None:
        self._text = MarkedText()
        self._read_next: Callable[[], list[OutputEvent] | None] = self._read_content
        self._num_calls = 0
        self._header = ""
        self._body = ""
        self._arguments = JsonObject()

    def push(self, text: str) -> list[OutputEvent]:
        self._text.push(text)
        return self._read()

    def finish(self) -> list[OutputEvent]:
        self._text.end()
        return self._read()

    def _read(self) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        while (new := self._read_next()) is not None:
            events += new
        return events

    # Each state gives its events and sets the next state; None: nothing more to read now.

    def _read_content(self) -> list[OutputEvent] | None:
        text, marker = self._text.before(BEGIN_CALLS)
        if marker is not None:
            self._read_next = self._read_between
        return [Content(text)] if text or marker is not None else None

    def _read_between(self) -> list[OutputEvent] | None:
        """Between calls: whitespace, and nothing of interest else."""
        _, marker = self._text.before(BEGIN_CALL, END_CALLS)
        if marker is None:
            return None
        self._read_next = self._read_header if marker == BEGIN_CALL else self._read_content
        self._header = self._body = ""
        return []

    def _read_header(self) -> list[OutputEvent] | None:
        text, marker = self._text.before(SEPARATOR)
        self._header += text
        if marker is None:
            return None
        self._read_next = self._read_opening
        return []

    def _read_opening(self) -> list[OutputEvent] | None:
        """Up to the brace that opens the arguments."""
        text, marker = self._text.before("{", END_CALL)
        self._body += text
        if marker is None:
            return None
        named, _, _ = self._body.strip().partition("\n")
        has_name = bool(named) and not named.startswith("```")
        start = ToolStart(self._num_calls, named.strip() if has_name else self._header.strip())
        self._num_calls += 1
        if marker == END_CALL:
            self._read_next = self._read_between
            return [start, self._argument("{}")]
        self._arguments = JsonObject()
        self._arguments.push("{")
        self._read_next = self._read_arguments
        return [start, self._argument("{")]

    def _read_arguments(self) -> list[OutputEvent] | None:
        text = self._text.take_all()
        for place, char in enumerate(text, 1):
            self._arguments.push(char)
            if not self._arguments.depth:
                self._text.push(text[place:])
                self._read_next = self._read_closing
                return [self._argument(text[:place])]
        return [self._argument(text)] if text else None

    def _read_closing(self) -> list[OutputEvent] | None:
        """What follows the arguments: the end of the code block."""
        _, marker = self._text.before(END_CALL)
        if marker is None:
            return None
        self._read_next = self._read_between
        return []

    def _argument(self, text: str) -> ToolArguments:
        return ToolArguments(self._num_calls - 1, text)
