"""Runs of consecutive block ids: what lies together is copied together."""

from __future__ import annotations

from collections.abc import Iterator


def runs(block_ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, its block id, length) of each run of consecutive ids."""
    start = 0
    for i in range(1, len(block_ids) + 1):
        if i == len(block_ids) or block_ids[i] != block_ids[i - 1] + 1:
            yield start, block_ids[start], i - start
            start = i
