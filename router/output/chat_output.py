"""The text of one chat answer, read as it comes: what was thought, which tools are called, what is said."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.output.events import Content, OutputEvent, Reasoning, ToolArguments, ToolStart, joined
from router.output.reasoning import ReasoningSplit
from router.output.tool_parser import ToolParser


@dataclass(frozen=True, slots=True)
class ThoughtTokens:
    """The tags of a thought, where they are tokens of their own."""

    begin_id: int | None
    end_id: int | None


class ReasoningTokens:
    """Counts the tokens of a thought, tags included."""

    def __init__(self, tags: ThoughtTokens, *, is_open: bool) -> None:
        self.num_tokens = 0
        self._tags = tags
        self._is_open = is_open
        self._is_over = False

    def push(self, token_ids: Sequence[int]) -> None:
        if self._is_over:
            return
        for token_id in token_ids:
            self._is_open = self._is_open or token_id == self._tags.begin_id
            self.num_tokens += self._is_open
            if token_id == self._tags.end_id and self._is_open:
                self._is_over = True
                return


class ChatOutput:
    """Whitespace before tool calls is dropped: with tools, whitespace waits for the word that follows it."""

    def __init__(
        self,
        reasoning: ReasoningSplit | None,
        tools: ToolParser | None,
        *,
        allows_parallel: bool = True,
        reasoning_tokens: ReasoningTokens | None = None,
    ) -> None:
        self.num_calls = 0
        self._reasoning = reasoning
        self._tools = tools
        self._allows_parallel = allows_parallel
        self._reasoning_tokens = reasoning_tokens
        self._space = ""  # content that is only shown when a word follows

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reasoning_tokens.num_tokens if self._reasoning_tokens else 0

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[OutputEvent]:
        if self._reasoning_tokens is not None:
            self._reasoning_tokens.push(token_ids)
        events = self._reasoning.push(text) if self._reasoning is not None else [Content(text)]
        return self._shown([new for event in events for new in self._with_tools(event)])

    def finish(self) -> list[OutputEvent]:
        events = self._reasoning.finish() if self._reasoning is not None else []
        events = [new for event in events for new in self._with_tools(event)]
        if self._tools is not None:
            events += self._tools.finish()
        shown = self._shown(events)
        space, self._space = self._space, ""
        return joined([*shown, Content("" if self.num_calls else space)])

    def _with_tools(self, event: OutputEvent) -> list[OutputEvent]:
        if self._tools is None or not isinstance(event, Content):
            return [event]
        return self._tools.push(event.text) if event.text else []

    def _shown(self, events: list[OutputEvent]) -> list[OutputEvent]:
        if self._tools is None:
            return joined(events)
        return joined([shown for event in events for shown in self._one_shown(event)])

    def _one_shown(self, event: OutputEvent) -> list[OutputEvent]:
        if isinstance(event, Reasoning):
            return [event]
        if isinstance(event, Content):
            text = self._space + event.text
            shown = text.rstrip()
            self._space = text[len(shown) :]
            return [Content(shown)]
        self._space = ""
        if event.index and not self._allows_parallel:
            return []
        if isinstance(event, ToolArguments):
            return [event]
        self.num_calls += 1
        return [replace(event, call_id=f"call_{uuid.uuid4().hex[:24]}")]


@dataclass(slots=True)
class ToolCall:
    call_id: str
    name: str
    arguments: str


@dataclass(slots=True)
class WholeOutput:
    content: str
    reasoning: str
    tool_calls: list[ToolCall]


def whole_output(events: Sequence[OutputEvent]) -> WholeOutput:
    whole = WholeOutput("", "", [])
    for event in events:
        if isinstance(event, Content):
            whole.content += event.text
        elif isinstance(event, Reasoning):
            whole.reasoning += event.text
        elif isinstance(event, ToolStart):
            whole.tool_calls.append(ToolCall(event.call_id, event.name, ""))
        else:
            whole.tool_calls[event.index].arguments += event.text
    return whole
