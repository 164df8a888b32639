"""x @ weight.T of a small decode step without matrix units: T rows, K inputs, N outputs."""

from __future__ import annotations

import torch

from engine.kernels.few_rows import FewRowsTile, multiply_few_rows
from engine.kernels.step_switches import SWITCHES


def takes(num_rows: int) -> bool:
    return num_rows <= SWITCHES.few_rows


def multiply(x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """[T, N] in x's dtype."""
    return multiply_few_rows(x_TK, weight_NK, out_TN, FewRowsTile(*SWITCHES.few_tile))
