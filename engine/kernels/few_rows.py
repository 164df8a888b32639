# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""x @ weight.T for the one or two rows of a small decode step, without matrix units: each program reads a few
whole rows of the weight at once, so that all of it is on its way after one trip to memory, and before the
rows of x are there.

How a step of few rows differs from larger ones, which fill the device without all this:
- 1 row: the experts' products do without matrix units (moe_one_token).
- Up to 2: dense products do too (here).
- Up to 4, all decodes: attention takes in the work on its rows and the latents' expansions (mla_few_rows).
- Up to 32: launches overlap (dependent_launch), which changes no bit.
All but the last sum in another order. So a row's results in bf16 may differ in their last bits between steps
of 1, 2, 3 to 4 and more rows; for the same number of rows they are the same bits.

T rows of x, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait

MAX_DEPTH = 4096  # inputs that a program holds at a time


@dataclass(frozen=True, slots=True)
class FewRowsTile:
    outputs: int
    num_warps: int


_TILES = {1: FewRowsTile(2, 2), 2: FewRowsTile(2, 4)}  # best of a whole step on an H100, by rows
MAX_ROWS = max(_TILES)  # cuBLAS is faster from 3 on


def few_rows_tile(num_rows: int) -> FewRowsTile:
    return _TILES[num_rows]


def multiply_few_rows(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    out_TN: torch.Tensor | None = None,
    tile: FewRowsTile | None = None,
) -> torch.Tensor:
    """[T, N] in x's dtype, summed in float32; T is at most MAX_ROWS."""
    num_rows, depth = x_TK.shape
    num_out = weight_NK.shape[0]
    assert num_rows <= MAX_ROWS and x_TK.stride(1) == 1 and weight_NK.is_contiguous()
    if out_TN is None:
        out_TN = x_TK.new_empty(num_rows, num_out)
    if num_rows:
        tile = tile or few_rows_tile(num_rows)
        _few_rows_kernel[(triton.cdiv(num_out, tile.outputs),)](
            x_TK,
            weight_NK,
            out_TN,
            num_out,
            depth,
            x_TK.stride(0),
            out_TN.stride(0),
            ROWS=num_rows,
            OUTPUTS=tile.outputs,
            BLOCK=min(MAX_DEPTH, triton.next_power_of_2(depth)),
            num_warps=tile.num_warps,
            **launch_options(num_rows),
        )
    return out_TN


@triton.jit
def _few_rows_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    num_out,
    depth,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_out
    ks = tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in range(0, depth, BLOCK):
        is_k = ks < depth - k
        place = outputs[:, None].to(tl.int64) * depth + k + ks[None, :]
        w = tl.load(w_ptr + place, mask=is_output[:, None] & is_k[None, :], other=0.0)
        wait(DEPENDENT)
        w = w.to(tl.float32)
        for t in tl.static_range(ROWS):
            x = tl.load(x_ptr + t * x_stride + k + ks, mask=is_k, other=0.0).to(tl.float32)
            part = tl.sum(w * x[None, :], 1)
            total += tl.where(rows[None, :] == t, part[:, None], 0.0)
    place = rows[None, :] * out_stride + outputs[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_output[:, None])
