"""The order in which a worker met its blocks, kept beside each block in Redis.

A worker gives a block a place, a number that grows, when it first has it, and the block keeps it through all
tiers. Blocks of one prompt are computed in order, so a router that sorts by place has them as the next prompt
will ask for them, in runs (memory_index.py), although a scan in Redis brings them in no order at all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import groupby, islice

from kvstore.block_hash import HASH_SIZE_BYTES, BlockHash, BlockTier

_PLACE_BYTES = 5
_TIER_CODES = {b"%d" % tier: tier for tier in BlockTier}
_HASH_FROM = _PLACE_BYTES + 1
_BATCH_RECORDS = 512


def place_bytes(place: int) -> bytes:
    """Ordered as the places are. In Redis the value of a block is the digit of its tier and this."""
    return place.to_bytes(_PLACE_BYTES, "big")


class ScannedBlocks:
    """All that a scan brings of one worker, in 22 bytes a block until it is given out in order."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # joined records of place, tier and hash, in order within each

    def add(self, found: Mapping[BlockHash, bytes]) -> None:
        """One piece of the scan, block hash -> value. Values that nobody here knows are left out, and one
        without a place comes first."""
        records = [
            value[1:].rjust(_PLACE_BYTES, b"\0") + value[:1] + block_hash
            for block_hash, value in found.items()
            if value[:1] in _TIER_CODES and len(value) <= 1 + _PLACE_BYTES
        ]
        if records:
            records.sort()
            self._pieces.append(b"".join(records))

    def batches(self) -> Iterator[list[tuple[BlockTier, list[BlockHash]]]]:
        """Everything by place, so many blocks at a time that a loop may go on in between: runs of one tier.
        A block that the scan brought twice comes twice."""
        merged = heapq.merge(*map(_records, self._pieces))
        while batch := list(islice(merged, _BATCH_RECORDS)):
            yield [
                (_TIER_CODES[code], [BlockHash(record[_HASH_FROM:]) for record in records])
                for code, records in groupby(batch, key=_tier_code)
            ]


def _records(piece: bytes) -> Iterator[bytes]:
    size = _HASH_FROM + HASH_SIZE_BYTES
    return (piece[start : start + size] for start in range(0, len(piece), size))


def _tier_code(record: bytes) -> bytes:
    return record[_PLACE_BYTES:_HASH_FROM]
