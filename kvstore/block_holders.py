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
        self.alive = (holders | holders >> 1) & shown  # the low bit of every slot that came so far
        self.holders = holders
        self.counts: dict[int, list[int]] = {}  # slot -> blocks by tier; of those that dropped out
        self._since = 0
        self._num_blocks: dict[int, int] = {}  # holders, of those alive -> blocks

    def enter(self, holders: int, position: int) -> None:
        """From `position` on these hold the blocks."""
        spanned = self.holders & self.alive * SLOT_MASK
        self._num_blocks[spanned] = self._num_blocks.get(spanned, 0) + position - self._since
        self.holders, self._since = holders, position
        gone = self.alive & ~(holders | holders >> 1)
        if gone:
            self._drop_out(gone)

    def _drop_out(self, gone: int) -> None:
        self.alive &= ~gone
        while gone:
            slot = (gone.bit_length() - 1) // SLOT_BITS
            gone &= ~slot_mask(slot)
            counts = self.counts[slot] = [0] * len(BlockTier)
            for holders, num_blocks in self._num_blocks.items():
                counts[slot_value(holders, slot) - 1] += num_blocks
        left = self.alive * SLOT_MASK
        merged: dict[int, int] = {}
        for holders, num_blocks in self._num_blocks.items():
            merged[holders & left] = merged.get(holders & left, 0) + num_blocks
        self._num_blocks = merged
