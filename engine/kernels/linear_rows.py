"""x @ weight.T of a small decode step, by the kernel for so many rows: T rows, K inputs, N outputs."""

from __future__ import annotations

import torch

from engine.kernels.few_rows import multiply_few_rows
from engine.kernels.linear import multiply_into
from engine.kernels.linear_tiles import linear_tile
from engine.kernels.step_switches import SWITCHES


def takes(num_rows: int) -> bool:
    return num_rows <= max(SWITCHES.few_rows, SWITCHES.tile_rows)


def multiply(x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """[T, N] in x's dtype."""
    if x_TK.shape[0] <= SWITCHES.few_rows:
        return multiply_few_rows(x_TK, weight_NK, out_TN)
    if out_TN is None:
        out_TN = x_TK.new_empty(x_TK.shape[0], weight_NK.shape[0])
    multiply_into(out_TN, x_TK, weight_NK, None, linear_tile(x_TK.shape[0], is_fp8=False))
    return out_TN
