"""What an output must look like, in the words of the request."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_REGEX_CHARS = 8 << 10
# A compiler that descends needs stack for each rule of a chain: this many characters bound it.
MAX_RULES_CHARS = 32 << 10
MAX_JSON_CHARS = 128 << 10


class GrammarError(ValueError):
    """The grammar cannot be used. One line, for whoever wrote it."""


class GrammarKind(enum.Enum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # without text
    REGEX = "regex"  # Rust's syntax, of the whole output; \d is an ASCII digit
    EBNF = "ebnf"  # GBNF or Lark
    LARK = "lark"  # llguidance's
    CHOICE = "choice"  # a JSON list of strings


_MAX_CHARS = {
    GrammarKind.JSON_SCHEMA: MAX_JSON_CHARS,
    GrammarKind.JSON_OBJECT: 0,
    GrammarKind.REGEX: MAX_REGEX_CHARS,
    GrammarKind.EBNF: MAX_RULES_CHARS,
    GrammarKind.LARK: MAX_RULES_CHARS,
    GrammarKind.CHOICE: MAX_JSON_CHARS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    kind: GrammarKind
    text: str = ""
    is_compact: bool = False  # JSON without whitespace between its tokens
    begin_after: tuple[int, ...] = ()  # token ids: up to and with them the output is free

    def check(self) -> None:
        """GrammarError for what would take too long or too much to compile. What it means is not looked
        at, but for the shape of JSON."""
        most = _MAX_CHARS[self.kind]
        if len(self.text) > most:
            raise GrammarError(
                f"a {self.kind.value} grammar may have {most} characters, not {len(self.text)}"
            )
        if self.kind is GrammarKind.CHOICE:
            _check_choices(_parse(self.text))
        if self.kind is GrammarKind.JSON_SCHEMA:
            schema = _parse(self.text)
            if not isinstance(schema, dict | bool):
                raise GrammarError("a JSON schema must be an object")
            for pattern in _patterns(schema):
                if len(pattern) > MAX_REGEX_CHARS:
                    raise GrammarError(f"a pattern of a JSON schema may have {MAX_REGEX_CHARS} characters")


def _check_choices(choices: object) -> None:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise GrammarError("choices must be a list of one or more strings")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"not JSON: {error}") from error


def _patterns(schema: object) -> Iterator[str]:
    """Regular expressions anywhere in it; what only looks like one does no harm."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            if isinstance(node.get("patternProperties"), dict):
                yield from node["patternProperties"]
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)
