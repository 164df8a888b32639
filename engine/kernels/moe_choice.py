"""What the kernels of the experts pass on: T tokens, K experts a token, P = T * K pairs (token * K + k)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Route:
    """Pairs sorted by expert. Tile m covers sorted pairs start[m] .. end[m] of one expert; unused tiles are
    empty."""

    sorted_pairs_P: torch.Tensor  # int32
    tile_expert_M: torch.Tensor  # int32
    tile_start_M: torch.Tensor  # int32
    tile_end_M: torch.Tensor  # int32, at most start + tile_rows
    tile_rows: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Routed experts by falling score, then the shared ones."""

    weights_TK: torch.Tensor  # float32
    ids_TK: torch.Tensor  # int32
    counts_GE: torch.Tensor  # int32: of each group of `group_size` tokens those that go to each expert
    group_size: int
    route: Route | None = None  # of few tokens, of which no expert gets more than a tile's rows
