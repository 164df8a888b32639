"""Owner of all blocks of a worker.

Life of a block:
1. free: no content worth keeping.
2. used: one or more sequences hold a reference.
3. registered: while used it became full and computed, and got its hash; equal prompts share it from now on.
4. cached: registered and nobody's. The longest unused are evicted when there are too few free blocks.

Always: free + cached + used = total.

Attention reads a sequence whose blocks have consecutive ids in place, and gathers others. So a sequence is
put where there is room for it to grow, and the search goes on behind that room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from engine.outputs import BlockEvents
from kvstore.block_hash import BlockHash, BlockTier

_FREE = b"\x01"


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._is_free = bytearray(_FREE * num_blocks)  # runs of free blocks are found by bytearray.find
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._num_references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._num_evictions = [0] * num_blocks
        self._next_start = 0  # where the search for a place goes on
        self._stored: list[BlockHash] = []
        self._removed: list[BlockHash] = []

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - len(self._cached)

    @property
    def num_available(self) -> int:
        """What allocate() could give, evicting as needed."""
        return self.num_free + len(self._cached)

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The longest run of leading blocks that are here. They stay evictable until acquire()."""
        hits = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def block_of(self, block_hash: BlockHash) -> int | None:
        """Where it is; None when it is not here."""
        return self._block_of.get(block_hash)

    def generation(self, block_id: int) -> int:
        """While it is the same, a registered block keeps its content. Any thread may ask."""
        return self._num_evictions[block_id]

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """How many of these acquire() would take out of what is available."""
        return sum(self._num_references[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more reference to each of these registered blocks."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each of these used blocks."""
        for block_id in block_ids:
            assert self._num_references[block_id] > 0
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Blocks with one reference each; the caller has checked num_available. If possible they follow block
        `after`, else each other, with `room` free blocks behind the last."""
        assert num_blocks <= self.num_available
        self._evict(num_blocks - self.num_free)
        if after is not None and self._is_run(after + 1, num_blocks):
            taken = list(range(after + 1, after + 1 + num_blocks))
        elif num_blocks == 1 and after is not None:
            # It will be alone: take it from the far end, out of other sequences' way.
            taken = [self._is_free.rfind(_FREE)]
        else:
            taken = self._place(num_blocks, room)
        for block_id in taken:
            self._is_free[block_id] = 0
            self._num_references[block_id] = 1
        self.num_free -= num_blocks
        return taken

    def release(self, block_ids: Iterable[int]) -> None:
        """One reference less to each. Give a sequence's blocks in order: the last ones are evicted first,
        because a prefix is worth more than what follows it."""
        for block_id in reversed(list(block_ids)):
            count = self._num_references[block_id] - 1
            assert count >= 0, f"block {block_id} released more often than acquired"
            self._num_references[block_id] = count
            if count == 0:
                if self._hash_of[block_id] is None:
                    self._free(block_id)
                else:
                    self._cached[block_id] = None

    def register(self, block_id: int, block_hash: BlockHash) -> None:
        """A used block is full and computed. Where another has this hash already, this one stays private."""
        if self._hash_of[block_id] is None and block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id
            self._stored.append(block_hash)

    def take_events(self) -> BlockEvents:
        """What entered and left the prefix cache since the last call."""
        if not self._stored and not self._removed:
            return BlockEvents()
        # A hash may have entered and left several times: only the difference counts.
        balance = Counter(self._stored)
        balance.subtract(self._removed)
        self._stored.clear()
        self._removed.clear()
        return BlockEvents(
            placed=tuple(
                (block_hash, BlockTier.DEVICE) for block_hash, change in balance.items() if change > 0
            ),
            removed=tuple(block_hash for block_hash, change in balance.items() if change < 0),
        )

    def registered_hashes(self) -> list[BlockHash]:
        return list(self._block_of)

    def check_integrity(self, references: dict[int, int]) -> None:
        """`references` counts, by block id, what the sequences hold. AssertionError when the pool
        disagrees."""
        assert self.num_free == sum(self._is_free)
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks
        for block_id, count in enumerate(self._num_references):
            assert count == references.get(block_id, 0), f"block {block_id} has {count} references"
            is_free, is_cached = bool(self._is_free[block_id]), block_id in self._cached
            assert is_free + is_cached + (count > 0) == 1, f"block {block_id} is not in one state"
            block_hash = self._hash_of[block_id]
            assert not is_free or block_hash is None
            assert not is_cached or block_hash is not None
            assert block_hash is None or self._block_of[block_hash] == block_id
        assert len(self._block_of) == sum(block_hash is not None for block_hash in self._hash_of)

    def _is_run(self, start: int, length: int) -> bool:
        return self._is_free[start : start + length] == _FREE * length

    def _place(self, num_blocks: int, room: int) -> list[int]:
        run = self._find_run(num_blocks, room)
        if run is None:
            # What was released together is evicted together: a little more eviction mostly yields a run.
            self._evict(min(num_blocks + room, self.num_cached))
            run = self._find_run(num_blocks, room)
        if run is not None:
            return run
        taken, start = [], -1
        for _ in range(num_blocks):
            start = self._is_free.find(_FREE, start + 1)
            taken.append(start)
        return taken

    def _find_run(self, num_blocks: int, room: int) -> list[int] | None:
        for length in (num_blocks + room, num_blocks):
            run = _FREE * length
            start = self._is_free.find(run, self._next_start)
            if start < 0:
                start = self._is_free.find(run)
            if start >= 0:
                self._next_start = start + length
                return list(range(start, start + num_blocks))
        return None

    def _evict(self, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block_id = self._cached.popitem(last=False)[0]
            block_hash = self._hash_of[block_id]
            assert block_hash is not None
            self._num_evictions[block_id] += 1
            self._hash_of[block_id] = None
            del self._block_of[block_hash]
            self._removed.append(block_hash)
            self._free(block_id)

    def _free(self, block_id: int) -> None:
        self._is_free[block_id] = 1
        self.num_free += 1
