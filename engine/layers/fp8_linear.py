"""A matrix product whose weight is block-scaled FP8, on CUDA: half of bfloat16's memory, and matrix units at
twice the rate.

Up to a few hundred rows by kernels (engine/kernels/linear.py), more by cuBLAS, if this torch and this device
have such a product and it gets the numbers right: the first layer of a process tries it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional

from engine.checkpoint import fp8
from engine.checkpoint.fp8 import FP8_GROUP
from engine.layers.linear import Linear

_logger = logging.getLogger(__name__)
_BLOCK = (FP8_GROUP, FP8_GROUP)
_MAX_KERNEL_ROWS = 256  # of steps: cuBLAS is faster beyond (docs/log.md)
_SCALE_MULTIPLE = 4  # cuBLAS wants so many scales side by side, of rows and of inputs
_MAX_ERROR = 0.06  # of FP8 rows, relative to float32 with the same weights

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], "Linear | Fp8Linear"]


class Fp8Linear:
    """y = x @ weight.T. The inputs of more than two rows are quantised too."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        self._value_NK, self._scale_NK = fp8.quantise(weight_NK, _BLOCK)
        is_whole = self._scale_NK.shape[1] % _SCALE_MULTIPLE == 0
        self._has_library = is_whole and _library_works(weight_NK.device)

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        from engine.kernels.linear import multiply_fp8  # needs Triton, which a CPU has no use for

        if self._has_library and x_TK.shape[0] > _MAX_KERNEL_ROWS:
            return _multiply_by_library(x_TK, self._value_NK, self._scale_NK)
        return multiply_fp8(x_TK, self._value_NK, self._scale_NK)


def make_fp8_linear(weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear | Fp8Linear:
    """A layer with a bias, or with inputs that 128 does not divide, stays as it is."""
    if bias_N is not None or weight_NK.shape[1] % FP8_GROUP:
        return Linear(weight_NK, bias_N)
    return Fp8Linear(weight_NK)


def _multiply_by_library(x_TK: torch.Tensor, value_NK: torch.Tensor, scale_NK: torch.Tensor) -> torch.Tensor:
    from engine.kernels.fp8_quantise import quantise_rows  # needs Triton

    x = quantise_rows(x_TK, multiple=_SCALE_MULTIPLE, is_by_group=True)
    out = functional.scaled_mm(
        x.values,
        value_NK.t(),
        x.scales,
        functional.ScalingType.BlockWise1x128,
        scale_NK.t(),
        functional.ScalingType.BlockWise128x128,
        output_dtype=x_TK.dtype,
    )
    return out[: x_TK.shape[0]]


def _has_library(device: torch.device) -> bool:
    return device.type == "cuda" and hasattr(functional, "scaled_mm")


@cache
def _library_works(device: torch.device) -> bool:
    if not _has_library(device):
        return False
    generator = torch.Generator(device).manual_seed(0)
    depth = _SCALE_MULTIPLE * FP8_GROUP
    x = torch.randn(_MAX_KERNEL_ROWS + 1, depth, generator=generator, device=device)
    weight = torch.randn(3 * FP8_GROUP // 2, depth, generator=generator, device=device)
    value, scale = fp8.quantise(weight, _BLOCK)
    try:
        found = _multiply_by_library(x.bfloat16(), value, scale).float()
    except (RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        expected = x @ fp8.dequantise(value, scale, _BLOCK, torch.float32).t()
        relative_error = float((found - expected).norm() / expected.norm())
        if relative_error <= _MAX_ERROR:
            return True
        reason = f"an error of {relative_error:.3g}"
    _logger.warning("FP8 products of many rows fall back to slower kernels: %s", reason)
    return False
