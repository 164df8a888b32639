"""What a chat answer is made of, in the order in which it was generated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    index: int  # of the call in its answer
    name: str
    call_id: str = ""  # given by ChatOutput


@dataclass(frozen=True, slots=True)
class ToolArguments:
    index: int
    text: str  # the next piece of a JSON text


OutputEvent = Content | Reasoning | ToolStart | ToolArguments


def joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """Neighbours of one kind become one; empty ones go."""
    result: list[OutputEvent] = []
    for event in events:
        if not isinstance(event, ToolStart) and not event.text:
            continue
        last = result[-1] if result else None
        if isinstance(event, ToolArguments) and isinstance(last, ToolArguments) and last.index == event.index:
            result[-1] = ToolArguments(event.index, last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        else:
            result.append(event)
    return result
