# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Rows in FP8 (e4m3) with one scale for each 128 columns of a row, as DeepSeek-V3 (arXiv 2412.19437, section
3.3.2) quantises activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.checkpoint.fp8 import E4M3_MAX, FP8_GROUP


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """row = values * scales, each scale for its 128 columns."""

    values: torch.Tensor  # float8_e4m3fn [T, K]
    scales: torch.Tensor  # float32 [T, K / 128]


def quantise_rows(x_TK: torch.Tensor, *, multiple: int = 1, is_by_group: bool = False) -> Fp8Rows:
    """K is a multiple of 128; x may be a slice of columns. Rows that nobody wrote follow, up to a multiple of
    `multiple`. is_by_group: the scales of a group of columns lie together, not those of a row."""
    num_rows, depth = x_TK.shape
    assert depth % FP8_GROUP == 0 and x_TK.stride(1) == 1
    num_groups, most_rows = depth // FP8_GROUP, -(-num_rows // multiple) * multiple
    values = torch.empty(most_rows, depth, dtype=torch.float8_e4m3fn, device=x_TK.device)
    shape = (num_groups, most_rows) if is_by_group else (most_rows, num_groups)
    scales = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    scales = scales.t() if is_by_group else scales
    groups = min(16, triton.next_power_of_2(num_groups))
    if num_rows:
        _quantise_kernel[(num_rows, triton.cdiv(num_groups, groups))](
            x_TK,
            values,
            scales,
            depth,
            x_TK.stride(0),
            *scales.stride(),
            GROUPS=groups,
            SIZE=FP8_GROUP,
            num_warps=4,
        )
    return Fp8Rows(values, scales)


def quantise_rows_reference(x_TK: torch.Tensor) -> Fp8Rows:
    groups = x_TK.float().unflatten(1, (-1, FP8_GROUP))
    scales = groups.abs().amax(2).clamp_min(1e-12) / E4M3_MAX
    return Fp8Rows((groups / scales.unsqueeze(2)).flatten(1).to(torch.float8_e4m3fn), scales)


def dequantise_rows(rows: Fp8Rows) -> torch.Tensor:
    """float32."""
    return (rows.values.float().unflatten(1, (-1, FP8_GROUP)) * rows.scales.unsqueeze(2)).flatten(1)


@triton.jit(do_not_specialize=["scale_stride_t", "scale_stride_g"])
def _quantise_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    depth,
    stride,
    scale_stride_t,
    scale_stride_g,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    is_group = groups < depth // SIZE
    columns = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + t * stride + columns, mask=is_group[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 448.0
    q = (x / scale[:, None]).to(tl.float8e4nv)
    tl.store(values_ptr + t * depth + columns, q, mask=is_group[:, None])
    tl.store(scales_ptr + t * scale_stride_t + groups * scale_stride_g, scale, mask=is_group)
