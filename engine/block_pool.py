"""Owner of all blocks of a worker.

Life of a block:
1. free: no content worth keeping.
2. used: one or more sequences hold a reference.
3. registered: while used it became full and computed, and got its hash; equal prompts share it from now on.
4. cached: registered and nobody's. Oldest first, it is evicted when an allocation finds no free block.

Always: free + cached + used = total.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from engine.outputs import BlockEvents
from kvstore.block_hash import BlockHash


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # Ordered sets: O(1) to append, to take the oldest, and to take any one out. (A dict's first key is not O(1).)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._stored: list[BlockHash] = []
        self._removed: list[BlockHash] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """What allocate() could give, evicting as needed."""
        return len(self._free) + len(self._cached)

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The longest run of leading blocks that are here. They stay evictable until acquire()."""
        hits = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """How many of these acquire() would take out of what is available."""
        return sum(self._num_references[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more reference to each of these registered blocks."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Blocks with one reference each, in runs of consecutive ids where possible, going on from block `after`.
        The caller has checked num_available."""
        assert num_blocks <= self.num_available
        taken = []
        for _ in range(num_blocks):
            block_id = -1 if after is None else after + 1
            if block_id in self._free:
                del self._free[block_id]
            else:
                block_id = self._take_oldest()
            self._num_references[block_id] = 1
            taken.append(block_id)
            after = block_id
        return taken

    def release(self, block_ids: Iterable[int]) -> None:
        """One reference less to each. Give a sequence's blocks in order: its last ones will be evicted first, because
        a prefix is worth more than what follows it."""
        for block_id in reversed(list(block_ids)):
            count = self._num_references[block_id] - 1
            assert count >= 0, f"block {block_id} released more often than acquired"
            self._num_references[block_id] = count
            if count == 0:
                target = self._free if self._hash_of[block_id] is None else self._cached
                target[block_id] = None

    def register(self, block_id: int, block_hash: BlockHash) -> None:
        """A used block is full and computed. Where another block has this hash already, this one stays private."""
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
            stored=tuple(block_hash for block_hash, change in balance.items() if change > 0),
            removed=tuple(block_hash for block_hash, change in balance.items() if change < 0),
        )

    def registered_hashes(self) -> list[BlockHash]:
        """Everything in the prefix cache, for a full announcement."""
        return list(self._block_of)

    def check_integrity(self, references: dict[int, int]) -> None:
        """`references` counts, by block id, what the sequences hold. AssertionError when the pool disagrees."""
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks
        assert not self._free.keys() & self._cached.keys()
        for block_id, count in enumerate(self._num_references):
            assert count == references.get(block_id, 0), f"block {block_id}: {count} references, {references}"
            is_idle = block_id in self._free or block_id in self._cached
            assert is_idle == (count == 0), f"block {block_id} is {'idle' if is_idle else 'used'}"
            block_hash = self._hash_of[block_id]
            assert block_id not in self._free or block_hash is None
            assert block_id not in self._cached or block_hash is not None
            assert block_hash is None or self._block_of[block_hash] == block_id
        assert len(self._block_of) == sum(block_hash is not None for block_hash in self._hash_of)

    def _take_oldest(self) -> int:
        if self._free:
            return self._free.popitem(last=False)[0]
        block_id = self._cached.popitem(last=False)[0]
        block_hash = self._hash_of[block_id]
        assert block_hash is not None
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
        self._removed.append(block_hash)
        return block_id
