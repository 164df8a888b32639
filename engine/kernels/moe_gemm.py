# ruff: noqa: PLR0913, PLR0915, C901 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Grouped matrix products: each tile of sorted pairs times the weights of its expert.

`multiply_up_gate` gathers the tokens' rows and ends in up * silu(gate); `multiply_down` sends each result to
its pair's place. Weights are bf16 (or float32), or FP8 with a scale for each 128 x 128 block; then rows are
FP8 too, with a scale for each 128 columns of a row: quantised before the product, or inside it, which for few
rows costs less than a launch, or by the first product for the second. All give the same numbers.

Hopper multiplies FP8 with 64 rows or more on the left; for fewer, the compiler turns all weights into
float16 first. Swapped, the product is transposed: columns of weights stand where rows did, 64 at least.

P pairs, T tokens, K experts a token, D hidden, I intermediate, E experts, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.fp8_quantise import Fp8Rows
from engine.kernels.moe_choice import Route

_PAIRS_OF_ROW = 8  # more or less; for launch_options


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: by columns and depth, and how the compiler schedules it."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 1  # tiles of rows that share their weights' way through the cache
    is_bulk: bool = False  # blocks come by the tensor copy engine, where the depth fills them
    is_swapped: bool = False  # FP8 only: weights on the left, in 64s of columns


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """up_gate [E, 2 * I, D] (up rows, then gate rows) and down [E, D, I]; FP8 with the scales of their
    blocks, float32 [E, rows / 128, columns / 128]."""

    up_gate: torch.Tensor
    down: torch.Tensor
    up_gate_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.up_gate_scale is not None


def multiply_up_gate(
    x: torch.Tensor | Fp8Rows,
    weights: ExpertWeights,
    route: Route,
    experts_per_token: int,
    tile: Tile,
    *,
    quantises_out: bool = False,
) -> torch.Tensor | Fp8Rows:
    """[P, I] in the order of sorted pairs; x [T, D]."""
    num_pairs, size = route.sorted_pairs_P.shape[0], weights.down.shape[2]
    rows = x.values if isinstance(x, Fp8Rows) else x
    dtype = x.dtype if isinstance(x, torch.Tensor) else torch.bfloat16
    if quantises_out:
        assert tile.columns == FP8_GROUP
        values = torch.empty(num_pairs, size, dtype=torch.float8_e4m3fn, device=rows.device)
        scales = torch.empty(num_pairs, size // FP8_GROUP, dtype=torch.float32, device=rows.device)
        _launch(x, weights.up_gate, weights.up_gate_scale, values, scales, route, tile, experts_per_token)
        return Fp8Rows(values, scales)
    out = torch.empty(num_pairs, size, dtype=dtype, device=rows.device)
    _launch(x, weights.up_gate, weights.up_gate_scale, out, None, route, tile, experts_per_token)
    return out


def multiply_down(
    h: torch.Tensor | Fp8Rows, weights: ExpertWeights, route: Route, tile: Tile
) -> torch.Tensor:
    """[P, D], pair p in row p; h [P, I] in the order of sorted pairs."""
    rows = h.values if isinstance(h, Fp8Rows) else h
    dtype = h.dtype if isinstance(h, torch.Tensor) else torch.bfloat16
    out = torch.empty(rows.shape[0], weights.down.shape[1], dtype=dtype, device=rows.device)
    _launch(h, weights.down, weights.down_scale, out, None, route, tile, 0)
    return out


def _launch(
    a: torch.Tensor | Fp8Rows,
    b_ENK: torch.Tensor,
    b_scale: torch.Tensor | None,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    route: Route,
    tile: Tile,
    experts_per_token: int,
) -> None:
    rows, a_scale = (a.values, a.scales) if isinstance(a, Fp8Rows) else (a, None)
    depth = b_ENK.shape[2]
    is_bulk = tile.is_bulk and depth % tile.depth == 0
    assert b_scale is None or tile.depth == FP8_GROUP and FP8_GROUP % tile.columns == 0
    a_blocks = b_blocks = None
    if is_bulk:
        b_blocks = _blocks(b_ENK.flatten(0, 1), tile.columns, tile.depth)
        a_blocks = None if experts_per_token else _blocks(rows, route.tile_rows, tile.depth)
    num_columns = triton.cdiv(out.shape[1], tile.columns)
    num_tiles = route.tile_expert_M.shape[0]
    _grouped_kernel[(num_tiles * num_columns,)](
        rows,
        a_scale,
        b_ENK,
        b_scale,
        a_blocks,
        b_blocks,
        out,
        out_scale,
        route.sorted_pairs_P,
        route.tile_expert_M,
        route.tile_start_M,
        route.tile_end_M,
        num_tiles,
        out.shape[1],
        depth,
        b_ENK.shape[1],
        EXPERTS_PER_TOKEN=experts_per_token,
        IS_GATED=experts_per_token > 0,
        IS_FP8=b_scale is not None,
        QUANTISES=b_scale is not None and a_scale is None,
        QUANTISES_OUT=out_scale is not None,
        IS_EVEN=depth % tile.depth == 0,
        ROWS=route.tile_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=tile.group,
        IS_SWAPPED=tile.is_swapped,
        PRECISION="ieee" if b_ENK.dtype == torch.float32 else "tf32",
        IS_BULK=is_bulk,
        **launch_options(route.sorted_pairs_P.shape[0] // _PAIRS_OF_ROW),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _blocks(matrix: torch.Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [num_rows, num_columns])


@triton.jit
def quantise_tile(a):
    """(FP8, scale of each row) of a [rows, 128] tile; the rule of fp8_quantise."""
    a = a.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(a), 1), 1e-12) / 448.0
    return (a / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _scaled_product(a, b, scale, IS_SWAPPED: tl.constexpr):
    """a [rows, 128] times b [128, columns], each row by its scale; transposed if swapped."""
    if IS_SWAPPED:
        product = tl.dot(b.T, a.T) * scale[None, :]
    else:
        product = tl.dot(a, b) * scale[:, None]
    return product


@triton.jit(do_not_specialize=["num_tiles"])
def _grouped_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    a_blocks,
    b_blocks,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_out,
    depth,
    b_rows,
    EXPERTS_PER_TOKEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_FP8: tl.constexpr,
    QUANTISES: tl.constexpr,
    QUANTISES_OUT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_BULK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    pid = tl.program_id(0)
    num_column_blocks = tl.cdiv(num_out, COLUMNS)
    # GROUP tiles of rows for one block of columns, then the next block of columns.
    group = pid // (GROUP * num_column_blocks)
    in_group = pid % (GROUP * num_column_blocks)
    group_size = tl.minimum(num_tiles - group * GROUP, GROUP)
    m = group * GROUP + in_group % group_size
    n = in_group // group_size
    start = tl.load(tile_start_ptr + m)
    end = tl.load(tile_end_ptr + m)
    expert = tl.load(tile_expert_ptr + m).to(tl.int64)
    if start >= end:
        return

    rows = start + tl.arange(0, ROWS)
    is_row = rows < end
    columns = n * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_out
    ks = tl.arange(0, DEPTH)
    if IS_GATED:
        a_rows = tl.load(pairs_ptr + rows, mask=is_row, other=0) // EXPERTS_PER_TOKEN
    else:
        a_rows = rows
    a_rows = a_rows.to(tl.int64)
    a = a_ptr + a_rows[:, None] * depth + ks[None, :]
    # Columns past the last read the last again: no mask in the loop, and what they give is not stored.
    b_columns = tl.minimum(columns, num_out - 1)
    b = b_ptr + expert * b_rows * depth + b_columns[None, :] * depth + ks[:, None]
    b_row = (expert * b_rows + n * COLUMNS).to(tl.int32)
    scale_columns = tl.cdiv(depth, 128)
    if IS_FP8:
        b_scale = b_scale_ptr + expert * tl.cdiv(b_rows, 128) * scale_columns
        b_scale += (n * COLUMNS // 128) * scale_columns
        gate_scale = b_scale + num_out // 128 * scale_columns

    LEFT: tl.constexpr = COLUMNS if IS_SWAPPED else ROWS
    RIGHT: tl.constexpr = ROWS if IS_SWAPPED else COLUMNS
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    acc_gate = tl.zeros((LEFT, RIGHT), tl.float32)
    for k in range(tl.cdiv(depth, DEPTH)):
        if IS_BULK:
            if IS_GATED:
                a_block = tl.load(a, mask=is_row[:, None], other=0.0)
                gate_block = b_blocks.load([b_row + num_out, k * DEPTH]).T
            else:
                a_block = a_blocks.load([start, k * DEPTH])
            b_block = b_blocks.load([b_row, k * DEPTH]).T
        elif IS_EVEN:
            # The weights first: what the rows' addresses wait for must not hold them up.
            b_block = tl.load(b)
            if IS_GATED:
                gate_block = tl.load(b + num_out * depth)
            a_block = tl.load(a, mask=is_row[:, None], other=0.0)
        else:
            is_k = ks < depth - k * DEPTH
            a_block = tl.load(a, mask=is_row[:, None] & is_k[None, :], other=0.0)
            b_block = tl.load(b, mask=is_k[:, None], other=0.0)
            if IS_GATED:
                gate_block = tl.load(b + num_out * depth, mask=is_k[:, None], other=0.0)
        if IS_FP8:
            if QUANTISES:
                a_block, a_scale = quantise_tile(a_block)
            else:
                a_scale = tl.load(a_scale_ptr + a_rows * scale_columns + k, mask=is_row, other=0.0)
            acc += _scaled_product(a_block, b_block, a_scale * tl.load(b_scale + k), IS_SWAPPED)
            if IS_GATED:
                acc_gate += _scaled_product(
                    a_block, gate_block, a_scale * tl.load(gate_scale + k), IS_SWAPPED
                )
        else:
            acc = tl.dot(a_block, b_block, acc, input_precision=PRECISION)
            if IS_GATED:
                acc_gate = tl.dot(a_block, gate_block, acc_gate, input_precision=PRECISION)
        a += DEPTH
        b += DEPTH

    if IS_SWAPPED:
        acc = acc.T
        acc_gate = acc_gate.T
    if IS_GATED:
        acc = acc * acc_gate / (1.0 + tl.exp(-acc_gate))
        out_rows = a_rows * 0 + rows
        if QUANTISES_OUT:
            # From bf16, as if the rows had been written first: the same numbers.
            acc, scale = quantise_tile(acc.to(tl.bfloat16))
            tl.store(out_scale_ptr + out_rows * (num_out // 128) + n, scale, mask=is_row)
    else:
        out_rows = tl.load(pairs_ptr + rows, mask=is_row, other=0).to(tl.int64)
    out = out_ptr + out_rows[:, None] * num_out + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
