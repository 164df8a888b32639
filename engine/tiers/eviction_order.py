"""Which block of a tier goes first.

GreedyDual (Young 1994; Cao and Irani 1997): each block is worth clock + cost when it is used, the clock is
what the last evicted one was worth. So a block ages while others are used, and one that is dear to compute
ages more slowly; at equal cost this is least recently used first. A block that another one follows is never
evicted before it, because what follows is of no use without it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from engine.tiers.block_key import BlockKey
from kvstore.block_hash import BlockHash

# A block this deep costs twice what the first one does, because its tokens attend to all before them.
_DEPTH_OF_DOUBLE_COST = 512
_MIN_HEAP = 64


@dataclass(slots=True)
class _Entry:
    key: BlockKey
    worth: float = 0.0
    order: int = 0  # of its last use
    num_pins: int = 0


class EvictionOrder:
    def __init__(self) -> None:
        self.num_pinned = 0  # blocks
        self._entries: dict[BlockHash, _Entry] = {}
        self._num_children: dict[BlockHash, int] = {}  # that are here, also of blocks that are not
        self._heap: list[tuple[float, int, BlockHash]] = []  # evictable ones, and outdated items
        self._expected: set[BlockHash] = set()  # whose parents are pinned
        self._clock = 0.0
        self._num_uses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._entries

    def keys(self) -> list[BlockKey]:
        return [entry.key for entry in self._entries.values()]

    def key_of(self, block_hash: BlockHash) -> BlockKey:
        return self._entries[block_hash].key

    def add(self, key: BlockKey) -> None:
        assert key.block_hash not in self._entries
        self._entries[key.block_hash] = _Entry(key)
        self._num_children[key.parent] = self._num_children.get(key.parent, 0) + 1
        self.use(key.block_hash)

    def use(self, block_hash: BlockHash) -> None:
        entry = self._entries[block_hash]
        self._num_uses += 1
        entry.worth = self._clock + 1.0 + entry.key.depth / _DEPTH_OF_DOUBLE_COST
        entry.order = self._num_uses
        self._push(entry)

    def pin(self, block_hash: BlockHash) -> None:
        """Not evicted until as many calls of unpin()."""
        entry = self._entries[block_hash]
        self.num_pinned += entry.num_pins == 0
        entry.num_pins += 1

    def unpin(self, block_hash: BlockHash) -> None:
        entry = self._entries[block_hash]
        assert entry.num_pins > 0
        entry.num_pins -= 1
        self.num_pinned -= entry.num_pins == 0
        self._push(entry)

    def pin_parent(self, key: BlockKey) -> None:
        """While its child is on the way here: the one is of no use without the other."""
        if key.parent in self._entries:
            self.pin(key.parent)
            self._expected.add(key.block_hash)

    def unpin_parent(self, key: BlockKey) -> None:
        if key.block_hash in self._expected:
            self._expected.remove(key.block_hash)
            self.unpin(key.parent)

    def is_pinned(self, block_hash: BlockHash) -> bool:
        return self._entries[block_hash].num_pins > 0

    def remove(self, block_hash: BlockHash) -> None:
        entry = self._entries.pop(block_hash)
        assert entry.num_pins == 0, "a pinned block is removed"
        parent = entry.key.parent
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            if parent in self._entries:
                self._push(self._entries[parent])

    def pop(self) -> BlockKey | None:
        """Removes the one to go first; None when all are pinned."""
        while self._heap:
            worth, order, block_hash = heapq.heappop(self._heap)
            entry = self._entries.get(block_hash)
            if entry is not None and entry.order == order and self._is_evictable(entry):
                self._clock = worth
                self.remove(block_hash)
                return entry.key
        return None

    def _is_evictable(self, entry: _Entry) -> bool:
        return entry.num_pins == 0 and entry.key.block_hash not in self._num_children

    def _push(self, entry: _Entry) -> None:
        if not self._is_evictable(entry):
            return
        heapq.heappush(self._heap, (entry.worth, entry.order, entry.key.block_hash))
        if len(self._heap) > _MIN_HEAP + 4 * len(self._entries):
            evictable = filter(self._is_evictable, self._entries.values())
            self._heap = [(e.worth, e.order, e.key.block_hash) for e in evictable]
            heapq.heapify(self._heap)
