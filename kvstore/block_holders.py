"""Who holds a block, as an integer, and how a prompt is followed through such integers.

A worker has a slot: two bits, 0 for a block that it does not hold, else tier + 1.
"""

from __future__ import annotations

from kvstore.block_hash import BlockTier

SLOT_BITS = 2
SLOT_MASK = (1 << SLOT_BITS) - 1


def slot_mask(slot: int) -> int:
    return SLOT_MASK << SLOT_BITS * slot


def slot_value(holders: int, slot: int) -> int:
    """0, or tier + 1."""
    return holders >> SLOT_BITS * slot & SLOT_MASK


class PrefixTally:
    """Follows a prompt: how far each worker has come without a gap, and in which tiers.

    Blocks are counted by their holders, whoever these are, and by worker only where one drops out.
    """

    def __init__(self, holders: int, shown: int) -> None:
        """`holders` of the first block; `shown`: the low bit of every slot that counts."""
        self.counts: dict[int, list[int]] = {}  # slot -> blocks by tier; of those that dropped out
        self._alive = (holders | holders >> 1) & shown  # the low bit of every slot that came so far
        self._alive_mask = self._alive * SLOT_MASK
        self._holders = holders & self._alive_mask
        self._since = 0
        self._num_blocks = {self._holders: 0}  # holders, of those alive -> blocks

    @property
    def is_anyone_left(self) -> bool:
        return self._alive > 0

    def enter(self, holders: int, position: int) -> None:
        """From `position` on these hold the blocks."""
        self._num_blocks[self._holders] += position - self._since
        self._since = position
        self._holders = holders & self._alive_mask
        if self._holders not in self._num_blocks:  # else nobody drops out: all who are left had those blocks
            gone = self._alive & ~(holders | holders >> 1)
            if gone:
                self._drop_out(gone)
            self._holders &= self._alive_mask
            self._num_blocks.setdefault(self._holders, 0)

    def _drop_out(self, gone: int) -> None:
        self._alive &= ~gone
        self._alive_mask = self._alive * SLOT_MASK
        while gone:
            slot = (gone.bit_length() - 1) // SLOT_BITS
            gone &= ~slot_mask(slot)
            counts = self.counts[slot] = [0] * len(BlockTier)
            for holders, num_blocks in self._num_blocks.items():
                counts[slot_value(holders, slot) - 1] += num_blocks
        merged: dict[int, int] = {}
        for holders, num_blocks in self._num_blocks.items():
            kept = holders & self._alive_mask
            merged[kept] = merged.get(kept, 0) + num_blocks
        self._num_blocks = merged
