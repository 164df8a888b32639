"""How to cut the expert products, by number of tokens and kind of weight.

Tuned on one H100 80 GB with DeepSeek-V2-Lite's experts (hidden 2048, intermediate 1408, 64 experts, 6 a
token, 2 shared) by `python -m benchmarks.gpu_kernels --tune`, up to 8 tokens of bf16 in whole decode steps
(docs/log.md, 2026-11-26); a start for other shapes, always correct.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.kernels.few_rows import FewRowsTile
from engine.kernels.moe_gemm import Tile


@dataclass(frozen=True, slots=True)
class MoeTiles:
    rows: int  # of a tile; one sort serves both products
    up_gate: Tile
    down: Tile
    quantises_inside: bool = True  # FP8 only: no separate pass over the rows
    quantises_h: bool = False  # FP8 only: the first product does, in tiles of 128 columns


@dataclass(frozen=True, slots=True)
class SpecialisedTiles:
    """Those of moe_specialised, which has one way to cut."""

    rows: int = 128


@dataclass(frozen=True, slots=True)
class OneTokenTiles:
    """Those of moe_one_token."""

    up_gate: FewRowsTile
    down: FewRowsTile


ExpertTiles = MoeTiles | OneTokenTiles | SpecialisedTiles


def _swapped(columns: int, num_stages: int) -> Tile:
    """Of few rows in FP8."""
    return Tile(columns, 128, 4, num_stages, is_bulk=True, is_swapped=True)


# Up to so many tokens.
_BF16: dict[int, MoeTiles | OneTokenTiles] = {
    1: OneTokenTiles(FewRowsTile(4, 8), FewRowsTile(2, 4)),
    2: MoeTiles(16, Tile(32, 128, 4, 5), Tile(64, 128, 4, 3)),
    4: MoeTiles(16, Tile(32, 128, 4, 5), Tile(64, 128, 4, 4)),
    8: MoeTiles(16, Tile(128, 128, 4, 3, is_bulk=True), Tile(64, 128, 4, 4, is_bulk=True)),
    24: MoeTiles(16, Tile(128, 128, 4, 3), Tile(64, 128, 4, 4, is_bulk=True)),
    48: MoeTiles(32, Tile(64, 128, 4, 4), Tile(128, 128, 4, 3, is_bulk=True)),
    192: MoeTiles(32, Tile(128, 128, 4, 3), Tile(128, 128, 4, 3, is_bulk=True)),
    384: MoeTiles(64, Tile(64, 64, 4, 3, is_bulk=True), Tile(128, 64, 8, 3, is_bulk=True)),
    768: MoeTiles(64, Tile(64, 64, 4, 3, 8, is_bulk=True), Tile(256, 64, 4, 3, 8, is_bulk=True)),
    1536: MoeTiles(128, Tile(64, 64, 8, 3, 8), Tile(128, 64, 8, 3, 8, is_bulk=True)),
    1 << 40: MoeTiles(128, Tile(128, 64, 8, 4, 8, is_bulk=True), Tile(256, 64, 8, 4, 8, is_bulk=True)),
}
_FP8: dict[int, MoeTiles] = {
    16: MoeTiles(16, _swapped(128, 3), _swapped(64, 4), quantises_h=True),
    96: MoeTiles(16, _swapped(128, 3), _swapped(128, 4), quantises_h=True),
    192: MoeTiles(32, _swapped(128, 3), _swapped(128, 3), quantises_inside=False, quantises_h=True),
    384: MoeTiles(64, Tile(64, 128, 4, 3, is_bulk=True), Tile(128, 128, 4, 3, is_bulk=True), False),
    768: MoeTiles(64, Tile(64, 128, 4, 4, 8), Tile(128, 128, 4, 4, 8, is_bulk=True), False),
    4096: MoeTiles(64, Tile(64, 128, 4, 3, 8, is_bulk=True), Tile(128, 128, 4, 3, 8, is_bulk=True), False),
    1 << 40: MoeTiles(
        128, Tile(64, 128, 4, 3, 8, is_bulk=True), Tile(128, 128, 8, 4, 8, is_bulk=True), False
    ),
}


_FLOAT32 = {1 << 40: MoeTiles(32, Tile(32, 32, 4, 3), Tile(64, 32, 4, 3))}


_SPECIALISED_TOKENS = 768  # from so many on: below, the two are equal


def moe_tiles(num_tokens: int, dtype: torch.dtype, *, is_specialised: bool = False) -> ExpertTiles:
    """dtype is that of the weights; is_specialised: engine/moe/specialised.py says that they can be."""
    if is_specialised and num_tokens >= _SPECIALISED_TOKENS:
        return SpecialisedTiles()
    table: Mapping[int, MoeTiles | OneTokenTiles] = _BF16
    if dtype == torch.float32:
        table = _FLOAT32
    elif dtype == torch.float8_e4m3fn:
        table = _FP8
    limits = list(table)
    return table[limits[bisect_left(limits, num_tokens)]]
