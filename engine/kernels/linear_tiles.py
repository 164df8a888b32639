"""How to cut a dense product, by number of rows and kind of weight. Tuned as moe_tiles is."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearTile:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 1  # tiles of rows that share their weights' way through the cache
    quantises_inside: bool = True  # FP8 only: no separate pass over the rows


_BF16: dict[int, LinearTile] = {16: LinearTile(16, 16, 128, 4, 5), 1 << 30: LinearTile(32, 32, 128, 4, 4, 8)}
_FP8: dict[int, LinearTile] = {
    16: LinearTile(16, 16, 128, 4, 5),
    64: LinearTile(32, 32, 128, 4, 4, 8),
    1 << 30: LinearTile(128, 128, 128, 8, 3, 8, quantises_inside=False),
}


def linear_tile(num_rows: int, *, is_fp8: bool) -> LinearTile:
    table = _FP8 if is_fp8 else _BF16
    limits = list(table)
    return table[limits[bisect_left(limits, num_rows)]]
