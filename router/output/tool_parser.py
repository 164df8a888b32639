"""Finding tool calls in the text of an answer, one class for each way in which models write them."""

from __future__ import annotations

from typing import Protocol

from router.output.events import Content, OutputEvent, ToolArguments, ToolStart
from router.output.json_call import JsonCall


class ToolParser(Protocol):
    """What it gives out, joined, does not depend on how the text is cut into pieces."""

    @property
    def markers(self) -> tuple[str, ...]:
        """What the detokenizer must show although they may be special tokens."""
        ...

    def push(self, text: str) -> list[OutputEvent]: ...

    def finish(self) -> list[OutputEvent]:
        """The text has ended; it may have been cut anywhere."""
        ...


class CallsReader:
    """JSON calls one after another, with whitespace and separators between them.

    Text that is no call comes back as Content: an object without a name, or whose name is not in `names`.
    """

    def __init__(self, names: frozenset[str] | None = None, separators: str = ",;[]") -> None:
        """`names`: of the tools, where only the name tells a call from other JSON."""
        self.num_calls = 0
        self._names = names
        self._skipped = separators + " \t\r\n"
        self._call: JsonCall | None = None
        self._is_started = False  # the call's name has gone out

    @property
    def is_between(self) -> bool:
        """No call is open."""
        return self._call is None

    def can_begin(self, char: str) -> bool:
        return char == "{" or char in self._skipped

    def push(self, char: str) -> list[OutputEvent]:
        """A character that can_begin(), or any while a call is open."""
        if self._call is None:
            if char != "{":
                return []
            self._call, self._is_started = JsonCall(), False
        self._call.push(char)
        events = self._news(self._call)
        if self._call.is_closed:
            if not self._is_started:
                events.append(Content(self._call.raw))
            self._call = None
        return events

    def finish(self) -> list[OutputEvent]:
        call, self._call = self._call, None
        return [] if call is None or self._is_started else [Content(call.raw)]

    def _news(self, call: JsonCall) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        if call.name is None or (self._names is not None and call.name not in self._names):
            return events
        if not self._is_started:
            self._is_started = True
            events.append(ToolStart(self.num_calls, call.name))
            self.num_calls += 1
        if arguments := call.take_arguments():
            events.append(ToolArguments(self.num_calls - 1, arguments))
        return events
