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
    """Follows a prompt: how far each worker has come without a gap, and in which tiers."""

    def __init__(self, holders: int, shown: int) -> None:
        """`holders` of the first block; `shown`: the low bit of every slot that counts."""
        self.alive = ((holders | holders >> 1) & shown) * SLOT_MASK  # all bits of those who came so far
        self.holders = 0
        self.counts: dict[int, list[int]] = {}  # slot -> blocks by tier
        self._since: dict[int, int] = {}  # slot -> where the present tier began

    def enter(self, holders: int, position: int) -> None:
        """From `position` on these hold the blocks. Costs only where a worker's tier changes."""
        changed = (self.holders ^ holders) & self.alive
        while changed:
            slot = ((changed & -changed).bit_length() - 1) // SLOT_BITS
            changed &= ~slot_mask(slot)
            before, now = slot_value(self.holders, slot), slot_value(holders, slot)
            if before:
                self.counts[slot][before - 1] += position - self._since[slot]
            else:
                self.counts[slot] = [0] * len(BlockTier)
            self._since[slot] = position
            if not now:
                self.alive &= ~slot_mask(slot)
        self.holders = holders
