"""Reads {"name": ..., "arguments": {...}} character by character, giving out the arguments as they come."""

from __future__ import annotations

import json

ARGUMENT_KEYS = ("arguments", "parameters")


class JsonObject:
    """Where a JSON object ends. Feed it from its opening brace on."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_in_string = False
        self._is_escaped = False

    def push(self, char: str) -> None:
        if self.is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self.is_in_string = False
        elif char == '"':
            self.is_in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class JsonCall:
    """One call. Look at `name` and take_arguments() after every push.

    Arguments that are an object go on character by character. Some models write JSON inside a string: that is
    decoded at its end. A call without arguments has {}.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_closed = False
        self._object = JsonObject()
        self._raw: list[str] = []
        self._key: str | None = None  # of the value being read, on the outermost level
        self._piece: list[str] = []  # of the key or the value being read
        self._arguments: list[str] = []  # not yet taken
        self._has_arguments = False
        self._is_passing = False

    @property
    def raw(self) -> str:
        """All of it, for whoever finds that it is no call."""
        return "".join(self._raw)

    def push(self, char: str) -> None:
        """The next character, of which the first is the opening brace."""
        self._raw.append(char)
        depth = self._object.depth
        is_outside = depth == 1 and not self._object.is_in_string
        self._object.push(char)
        if is_outside and char in ",}":
            self._end_value()
        elif is_outside and char == ":" and self._key is None:
            self._key = str(_decoded(self._piece))
            self._piece.clear()
        elif is_outside and char == "{" and self._key in ARGUMENT_KEYS:
            self._has_arguments = self._is_passing = True
            self._arguments.append(char)
        elif self._is_passing:
            if depth > 1:
                self._arguments.append(char)
        elif depth:
            self._piece.append(char)

    def take_arguments(self) -> str:
        """What came since the last call; nothing before the name is known."""
        if self.name is None:
            return ""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def _end_value(self) -> None:
        value = None if self._is_passing else _decoded(self._piece)
        if self._key == "name" and isinstance(value, str):
            self.name = value
        elif self._key in ARGUMENT_KEYS and not self._has_arguments and value is not None:
            self._arguments.append(value if isinstance(value, str) else json.dumps(value))
            self._has_arguments = True
        self.is_closed = self._object.depth == 0
        if self.is_closed and not self._has_arguments:
            self._arguments.append("{}")
        self._key, self._is_passing = None, False
        self._piece.clear()


def _decoded(piece: list[str]) -> object:
    try:
        return json.loads("".join(piece))
    except ValueError:
        return None
