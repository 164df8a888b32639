"""How to cut a dense FP8 product, by number of rows. Tuned as moe_tiles is."""

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
    quantises_inside: bool = True  # no separate pass over the rows


_TILES: dict[int, LinearTile] = {
    16: LinearTile(16, 16, 128, 4, 5),
    64: LinearTile(32, 32, 128, 4, 4, 8),
    1 << 30: LinearTile(128, 128, 128, 8, 3, 8, quantises_inside=False),
}


def linear_tile(num_rows: int) -> LinearTile:
    limits = list(_TILES)
    return _TILES[limits[bisect_left(limits, num_rows)]]
