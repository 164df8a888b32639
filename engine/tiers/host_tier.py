"""Blocks in host memory: slots of the size of a block, and which block is in which.

The memory is a KvCache of its own: on the CPU a shared memory file like the device's, beside CUDA pinned, so
that copies run without the processor. Belongs to the engine thread; other threads read and write the contents
of slots that are pinned or reserved for them.

Always: free + cached + used = slots; used are the pinned ones and those being filled.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.tiers.block_key import BlockKey
from engine.tiers.eviction_order import EvictionOrder
from kvstore.block_hash import BlockHash

OnEvict = Callable[[BlockHash], None]


class HostTier:
    def __init__(self, layout: KvLayout, num_slots: int, *, is_pinned: bool = False) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self.blocks = KvCache(layout, num_slots, is_shared=not is_pinned, is_pinned=is_pinned)
        self.on_evict: OnEvict = lambda block_hash: None  # called with what goes
        self._free = list(range(num_slots - 1, -1, -1))  # the last one is taken first
        self._filling: dict[int, BlockKey] = {}
        self._slots: dict[BlockHash, int] = {}
        self._order = EvictionOrder()
        self._unwanted: set[BlockHash] = set()  # discarded while they were pinned

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._order) - self._order.num_pinned

    @property
    def num_used(self) -> int:
        return len(self._filling) + self._order.num_pinned

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._slots

    def hashes(self) -> list[BlockHash]:
        return list(self._slots)

    def slot_of(self, block_hash: BlockHash) -> int:
        return self._slots[block_hash]

    def use(self, block_hash: BlockHash) -> None:
        self._order.use(block_hash)

    def reserve(self, key: BlockKey) -> int | None:
        """A slot for this block, which is not here, if need be the one of the block that goes first; then
        commit() or cancel(). None: all are in use, or hold what comes before this block. For one without the
        block before it, which is of less use than any other, nothing is evicted."""
        self._order.pin_parent(key)
        if not self._free and not (self._is_connected(key) and self._evict()):
            self._unpin_parent(key)
            return None
        slot = self._free.pop()
        self._filling[slot] = key
        return slot

    def commit(self, slot: int) -> None:
        """The slot holds its block."""
        key = self._filling.pop(slot)
        self._slots[key.block_hash] = slot
        self._order.add(key)
        self._unpin_parent(key)

    def cancel(self, slot: int) -> None:
        self._unpin_parent(self._filling.pop(slot))
        self._free.append(slot)

    def discard(self, block_hash: BlockHash) -> None:
        """Not needed here any more. A pinned one goes when it is not."""
        if block_hash not in self._slots:
            return
        if self._order.is_pinned(block_hash):
            self._unwanted.add(block_hash)
            return
        self.on_evict(block_hash)
        self._order.remove(block_hash)
        self._give_up(block_hash)

    def pin(self, block_hash: BlockHash) -> int:
        """Its slot, which keeps it until as many calls of unpin()."""
        self._order.pin(block_hash)
        return self._slots[block_hash]

    def unpin(self, block_hash: BlockHash) -> None:
        self._order.unpin(block_hash)
        self._discard_unwanted(block_hash)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self.blocks.close()

    def check_integrity(self) -> None:
        slots = [*self._free, *self._filling, *self._slots.values()]
        assert sorted(slots) == list(range(self.num_slots)), "a slot is in no state, or in two"
        assert self.num_free + self.num_cached + self.num_used == self.num_slots
        assert {key.block_hash for key in self._order.keys()} == set(self._slots)
        assert all(
            block_hash in self._slots and self._order.is_pinned(block_hash) for block_hash in self._unwanted
        )

    def _is_connected(self, key: BlockKey) -> bool:
        if key.depth == 0 or key.parent in self._slots:
            return True
        return any(other.block_hash == key.parent for other in self._filling.values())

    def _evict(self) -> bool:
        key = self._order.pop()
        if key is None:
            return False
        self.on_evict(key.block_hash)
        self._give_up(key.block_hash)
        return True

    def _give_up(self, block_hash: BlockHash) -> None:
        self._free.append(self._slots.pop(block_hash))
        self._unwanted.discard(block_hash)

    def _unpin_parent(self, key: BlockKey) -> None:
        self._order.unpin_parent(key)
        self._discard_unwanted(key.parent)

    def _discard_unwanted(self, block_hash: BlockHash) -> None:
        if block_hash in self._unwanted:
            self.discard(block_hash)
