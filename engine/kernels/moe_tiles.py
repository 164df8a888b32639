"""How to cut the expert products, by number of tokens and kind of weight.

Tuned on one H100 80 GB with DeepSeek-V2-Lite's experts (hidden 2048, intermediate 1408, 64 experts, 6 a
token, 2 shared) by `python -m benchmarks.gpu_kernels --tune`; a start for other shapes, always correct.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from engine.kernels.moe_gemm import Tile


@dataclass(frozen=True, slots=True)
class MoeTiles:
    rows: int  # of a tile; one sort serves both products
    up_gate: Tile
    down: Tile
    quantises_inside: bool = True  # FP8 only: no separate pass over the rows


_BF16: dict[int, MoeTiles] = {
    16: MoeTiles(16, Tile(32, 128, 4, 4), Tile(32, 128, 4, 4)),
    512: MoeTiles(32, Tile(64, 64, 4, 4, 8), Tile(64, 64, 4, 4, 8)),
    1024: MoeTiles(64, Tile(64, 64, 4, 4, 8), Tile(128, 64, 4, 4, 8)),
    1 << 30: MoeTiles(128, Tile(128, 64, 8, 4, 8), Tile(256, 64, 8, 4, 8)),
}
_FP8: dict[int, MoeTiles] = {
    16: MoeTiles(16, Tile(32, 128, 4, 4), Tile(32, 128, 4, 4)),
    512: MoeTiles(32, Tile(64, 128, 4, 3, 8), Tile(64, 128, 4, 3, 8)),
    1024: MoeTiles(64, Tile(64, 128, 4, 3, 8), Tile(128, 128, 4, 3, 8)),
    1 << 30: MoeTiles(128, Tile(64, 128, 8, 3, 8), Tile(128, 128, 8, 3, 8), quantises_inside=False),
}


def moe_tiles(num_tokens: int, is_fp8: bool) -> MoeTiles:
    table = _FP8 if is_fp8 else _BF16
    limits = list(table)
    return table[limits[bisect_left(limits, num_tokens)]]
