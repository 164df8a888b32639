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


def common_runs(first: list[int], second: list[int]) -> Iterator[tuple[int, int, int]]:
    """(id in `first`, id in `second`, length) of each run that is one in both; they are equally long."""
    start = 0
    for i in range(1, len(first) + 1):
        is_end = i == len(first)
        if is_end or first[i] != first[i - 1] + 1 or second[i] != second[i - 1] + 1:
            yield first[start], second[start], i - start
            start = i
