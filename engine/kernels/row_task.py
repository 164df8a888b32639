from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RowTask:
    """What mla_rows does to every row of a layer."""

    norm_weight_C: torch.Tensor
    norm_eps: float
    inverse_freq_R: torch.Tensor  # float32 [R / 2]
    magnitude: float  # of the rotations
