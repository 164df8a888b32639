"""An answer as a row of blocks, each of one kind, opened and closed in order: two of the APIs have it so."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from router.output.events import Content, OutputEvent, Reasoning, ToolStart

BlockKind = Literal["text", "reasoning", "tool"]


@dataclass(slots=True)
class Block:
    index: int
    kind: BlockKind
    call_id: str = ""  # of a tool call, as its name
    name: str = ""
    text: str = ""  # so far; of a tool call its arguments
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class BlockChange:
    kind: Literal["open", "piece", "close"]
    block: Block
    piece: str = ""


class Blocks:
    def __init__(self) -> None:
        self.all: list[Block] = []
        self._is_open = False

    def take(self, events: Iterable[OutputEvent]) -> list[BlockChange]:
        """Every block is opened, written piece by piece, and closed before the next one opens."""
        changes: list[BlockChange] = []
        for event in events:
            kind: BlockKind = "tool"
            if isinstance(event, Content):
                kind = "text"
            elif isinstance(event, Reasoning):
                kind = "reasoning"
            if isinstance(event, ToolStart):
                changes += self._open(Block(len(self.all), kind, event.call_id, event.name))
                continue
            if not self._is_open or self.all[-1].kind != kind:
                changes += self._open(Block(len(self.all), kind))
            block = self.all[-1]
            block.text += event.text
            changes.append(BlockChange("piece", block, event.text))
        return changes

    def end(self) -> list[BlockChange]:
        if not self._is_open:
            return []
        self._is_open = False
        return [BlockChange("close", self.all[-1])]

    def _open(self, block: Block) -> list[BlockChange]:
        closed = self.end()
        self.all.append(block)
        self._is_open = True
        return [*closed, BlockChange("open", block)]
