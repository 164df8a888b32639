# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""FP8 rows of tokens in the order of sorted pairs, so that a tile of them is one block of memory.

T tokens, P pairs, K experts a token, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.fp8_quantise import Fp8Rows
from engine.kernels.moe_choice import Route

_ROWS = 4  # of one program


def gather_rows(x: Fp8Rows, route: Route, num_rows: int, experts_per_token: int) -> Fp8Rows:
    """Row i is x[pair i // K] for the first num_rows sorted pairs; the scales of all pairs."""
    values = x.values.new_empty(num_rows, x.values.shape[1])
    scales = x.scales.new_empty(route.sorted_pairs_P.shape[0], x.scales.shape[1])
    _launch(x.values.view(torch.uint8), route, experts_per_token, values.view(torch.uint8))
    _launch(x.scales, route, experts_per_token, scales)
    return Fp8Rows(values, scales)


def _launch(x_TD: torch.Tensor, route: Route, experts_per_token: int, out: torch.Tensor) -> None:
    num_rows, width = out.shape
    block = min(16 * FP8_GROUP, triton.next_power_of_2(width))
    _gather_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(width, block))](
        x_TD,
        route.sorted_pairs_P,
        out,
        num_rows,
        width,
        x_TD.stride(0),
        EXPERTS_PER_TOKEN=experts_per_token,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    x_ptr,
    pairs_ptr,
    out_ptr,
    num_rows,
    width,
    stride,
    EXPERTS_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    mask = is_row[:, None] & (columns < width)[None, :]
    tokens = (tl.load(pairs_ptr + rows, mask=is_row, other=0) // EXPERTS_PER_TOKEN).to(tl.int64)
    x = tl.load(x_ptr + tokens[:, None] * stride + columns[None, :], mask=mask)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], x, mask=mask)
