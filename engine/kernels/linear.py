# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""x @ weight.T of a dense layer whose FP8 weights have a scale for each 128 x 128 block. One or two rows do
without matrix units and are not quantised themselves, as in few_rows.py; the rows of more are FP8 too.

T rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.few_rows import MAX_DEPTH, MAX_ROWS, few_rows_tile
from engine.kernels.fp8_quantise import Fp8Rows, quantise_rows
from engine.kernels.linear_tiles import LinearTile, linear_tile
from engine.kernels.moe_gemm import quantise_tile


def multiply_fp8(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, scale_NK: torch.Tensor, tile: LinearTile | None = None
) -> torch.Tensor:
    """[T, N] in x's dtype; K is a multiple of 128."""
    num_rows = x_TK.shape[0]
    out = x_TK.new_empty(num_rows, weight_NK.shape[0])
    if tile is None and 0 < num_rows <= MAX_ROWS:
        _launch_few(out, x_TK, weight_NK, scale_NK)
        return out
    tile = tile or linear_tile(num_rows)
    x = x_TK if tile.quantises_inside else quantise_rows(x_TK)
    _launch(out, x, weight_NK, scale_NK, tile)
    return out


def _launch_few(
    out_TN: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor, scale_NK: torch.Tensor
) -> None:
    num_rows, depth = x_TK.shape
    assert depth % FP8_GROUP == 0 and x_TK.stride(1) == 1 and weight_NK.is_contiguous()
    tile = few_rows_tile(num_rows)
    num_groups = depth // FP8_GROUP
    _few_rows_kernel[(triton.cdiv(out_TN.shape[1], tile.outputs),)](
        x_TK,
        weight_NK,
        scale_NK,
        out_TN,
        out_TN.shape[1],
        num_groups,
        x_TK.stride(0),
        out_TN.stride(0),
        ROWS=num_rows,
        OUTPUTS=tile.outputs,
        GROUPS=min(MAX_DEPTH // FP8_GROUP, triton.next_power_of_2(num_groups)),
        SIZE=FP8_GROUP,
        num_warps=tile.num_warps,
        **launch_options(num_rows),
    )


def _launch(
    out_TN: torch.Tensor,
    x: torch.Tensor | Fp8Rows,
    weight_NK: torch.Tensor,
    scale_NK: torch.Tensor,
    tile: LinearTile,
) -> None:
    rows, x_scale = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    num_rows, depth = rows.shape
    if num_rows == 0:
        return
    assert depth % tile.depth == 0 and tile.depth == FP8_GROUP and FP8_GROUP % tile.columns == 0
    assert rows.stride(1) == 1 and weight_NK.is_contiguous()
    num_row_tiles = triton.cdiv(num_rows, tile.rows)
    _linear_kernel[(num_row_tiles * triton.cdiv(out_TN.shape[1], tile.columns),)](
        rows,
        x_scale,
        weight_NK,
        scale_NK,
        out_TN,
        num_rows,
        out_TN.shape[1],
        depth,
        rows.stride(0),
        out_TN.stride(0),
        QUANTISES=x_scale is None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=tile.group,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(num_rows),
    )


@triton.jit
def _few_rows_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    num_out,
    num_groups,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_out
    rows = tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(0, num_groups, GROUPS):
        groups = first + tl.arange(0, GROUPS)
        is_group = groups < num_groups
        columns = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        w = w_ptr + outputs.to(tl.int64)[:, None, None] * (num_groups * SIZE) + columns[None, :, :]
        is_weight = is_output[:, None] & is_group[None, :]
        values = tl.load(w, mask=is_weight[:, :, None], other=0.0)
        scales = tl.load(
            scale_ptr + (outputs // SIZE)[:, None] * num_groups + groups[None, :], mask=is_weight, other=0.0
        )
        wait(DEPENDENT)
        values = values.to(tl.float32)
        for t in tl.static_range(ROWS):
            x = tl.load(x_ptr + t * x_stride + columns, mask=is_group[:, None], other=0.0).to(tl.float32)
            part = tl.sum(tl.sum(values * x[None, :, :], 2) * scales, 1)
            total += tl.where(rows[None, :] == t, part[:, None], 0.0)
    place = rows[None, :] * out_stride + outputs[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_output[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    num_rows,
    num_out,
    depth,
    x_stride,
    out_stride,
    QUANTISES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    pid = tl.program_id(0)
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    num_column_tiles = tl.cdiv(num_out, COLUMNS)
    group = pid // (GROUP * num_column_tiles)
    in_group = pid % (GROUP * num_column_tiles)
    group_size = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    m = group * GROUP + in_group % group_size
    n = in_group // group_size
    rows = (m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < num_rows
    columns = n * COLUMNS + tl.arange(0, COLUMNS)
    ks = tl.arange(0, DEPTH)
    x = x_ptr + rows[:, None] * x_stride + ks[None, :]
    # Columns past the last read the last again: no mask in the loop, and what they give is not stored.
    w_columns = tl.minimum(columns, num_out - 1).to(tl.int64)
    w = w_ptr + w_columns[None, :] * depth + ks[:, None]
    scale_columns = tl.cdiv(depth, 128)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait(DEPENDENT)
    for k in range(tl.cdiv(depth, DEPTH)):
        x_block = tl.load(x, mask=is_row[:, None], other=0.0)
        w_block = tl.load(w)
        if QUANTISES:
            x_block, x_scale = quantise_tile(x_block)
        else:
            x_scale = tl.load(x_scale_ptr + rows * scale_columns + k, mask=is_row, other=0.0)
        w_scale = tl.load(w_scale_ptr + (n * COLUMNS // 128) * scale_columns + k)
        acc += tl.dot(x_block, w_block) * (x_scale * w_scale)[:, None]
        x += DEPTH
        w += DEPTH
    out = out_ptr + rows[:, None] * out_stride + columns[None, :]
    mask = is_row[:, None] & (columns < num_out)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
