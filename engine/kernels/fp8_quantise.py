# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Rows in FP8 (e4m3) with one scale for each 128 columns of a row, as DeepSeek-V3 (arXiv 2412.19437, section
3.3.2) quantises activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.checkpoint.fp8 import E4M3_MAX

FP8_GROUP = 128  # columns of one scale; also both sides of a weight's block


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """row = values * scales, each scale for its 128 columns."""

    values: torch.Tensor  # float8_e4m3fn [T, K]
    scales: torch.Tensor  # float32 [T, K / 128]


def quantise_rows(x_TK: torch.Tensor) -> Fp8Rows:
    """K is a multiple of 128; x may be a slice of columns."""
    num_rows, depth = x_TK.shape
    assert depth % FP8_GROUP == 0 and x_TK.stride(1) == 1
    values = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scales = torch.empty(num_rows, depth // FP8_GROUP, dtype=torch.float32, device=x_TK.device)
    groups = min(16, triton.next_power_of_2(depth // FP8_GROUP))
    if num_rows:
        _quantise_kernel[(num_rows, triton.cdiv(depth // FP8_GROUP, groups))](
            x_TK, values, scales, depth, x_TK.stride(0), GROUPS=groups, SIZE=FP8_GROUP, num_warps=4
        )
    return Fp8Rows(values, scales)


def quantise_rows_reference(x_TK: torch.Tensor) -> Fp8Rows:
    groups = x_TK.float().unflatten(1, (-1, FP8_GROUP))
    scales = groups.abs().amax(2).clamp_min(1e-12) / E4M3_MAX
    return Fp8Rows((groups / scales.unsqueeze(2)).flatten(1).to(torch.float8_e4m3fn), scales)


def dequantise_rows(rows: Fp8Rows) -> torch.Tensor:
    """float32."""
    return (rows.values.float().unflatten(1, (-1, FP8_GROUP)) * rows.scales.unsqueeze(2)).flatten(1)


@triton.jit
def _quantise_kernel(x_ptr, values_ptr, scales_ptr, depth, stride, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    is_group = groups < depth // SIZE
    columns = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + t * stride + columns, mask=is_group[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 448.0
    q = (x / scale[:, None]).to(tl.float8e4nv)
    tl.store(values_ptr + t * depth + columns, q, mask=is_group[:, None])
    tl.store(scales_ptr + t * (depth // SIZE) + groups, scale, mask=is_group)
