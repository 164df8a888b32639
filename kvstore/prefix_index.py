"""Which worker holds which KV blocks, and in which tier.

Workers write their own changes with RedisIndex (redis_index.py). Each router follows them with IndexMirror
(index_mirror.py) into a MemoryIndex and looks prompts up there, without a round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.block_hash import BlockHash


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest run of leading blocks that a worker holds, in whichever tiers; never empty."""

    worker_id: str
    num_blocks: int
    num_blocks_by_tier: tuple[int, int, int]  # device, host, disk; a block counts once, in its fastest tier


class PrefixIndex(Protocol):
    def lookup(self, hashes: Sequence[BlockHash]) -> list[PrefixHit]:
        """Workers that hold at least the first block, longest run first."""
        ...
