# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The grouped products of many bf16 rows by programs that stay and take tile after tile; every block comes by
the tensor copy engine, so rows are gathered before.

A tile is `rows` by two blocks of columns, multiplied as one: up and gate of the same columns for the first
product, neighbours for the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.moe_choice import Route
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gather import gather_rows
from engine.kernels.moe_gemm import ExpertWeights


@dataclass(frozen=True, slots=True)
class PersistentTile:
    block: int = 128  # columns of one of the two blocks
    depth: int = 64
    num_warps: int = 8
    num_stages: int = 4
    group: int = 8  # tiles of rows that share their weights' way through the cache
    programs: int = 1  # on a multiprocessor


@dataclass(frozen=True, slots=True)
class PersistentTiles:
    rows: int = 128
    up_gate: PersistentTile = PersistentTile()
    down: PersistentTile = PersistentTile()


def run_products_persistent(
    x_TD: torch.Tensor, route: Route, spec: GateSpec, weights: ExpertWeights, tiles: PersistentTiles
) -> torch.Tensor:
    """[P, D], pair p in row p."""
    num_pairs = route.sorted_pairs_P.shape[0]
    rows = gather_rows(x_TD, route, num_pairs, spec.experts_per_token)
    h_PI = x_TD.new_empty(num_pairs, weights.down.shape[2])
    up_gate = weights.up_gate.unflatten(1, (2, -1)).flatten(0, 1)
    _launch(rows, up_gate, h_PI, route, tiles.up_gate, is_gated=True)
    y_PD = x_TD.new_empty(num_pairs, weights.down.shape[1])
    down = weights.down.unflatten(1, (-1, tiles.down.block)).flatten(0, 1)
    _launch(h_PI, down, y_PD, route, tiles.down, is_gated=False)
    return y_PD


def _launch(
    rows: torch.Tensor,
    b_BNK: torch.Tensor,
    out: torch.Tensor,
    route: Route,
    tile: PersistentTile,
    *,
    is_gated: bool,
) -> None:
    """b: for each expert up and gate, or its blocks of columns."""
    depth = b_BNK.shape[2]
    columns = tile.block * (1 if is_gated else 2)
    assert out.shape[1] % columns == 0 and depth % tile.depth == 0
    num_tiles = route.tile_expert_M.shape[0]
    num_programs = min(
        tile.programs * _num_multiprocessors(out.device), num_tiles * (out.shape[1] // columns)
    )
    _persistent_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(rows, [route.tile_rows, tile.depth]),
        TensorDescriptor.from_tensor(b_BNK, [2, tile.block, tile.depth]),
        out,
        route.sorted_pairs_P,
        route.tile_expert_M,
        route.tile_start_M,
        route.tile_end_M,
        num_tiles,
        out.shape[1],
        depth,
        IS_GATED=is_gated,
        ROWS=route.tile_rows,
        BLOCK=tile.block,
        DEPTH=tile.depth,
        GROUP=tile.group,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _num_used(tile_start_ptr, tile_end_ptr, num_tiles):
    """Tiles with rows; they come first."""
    num_used = 0
    for first in range(0, num_tiles, 256):
        tiles = first + tl.arange(0, 256)
        starts = tl.load(tile_start_ptr + tiles, mask=tiles < num_tiles, other=0)
        ends = tl.load(tile_end_ptr + tiles, mask=tiles < num_tiles, other=0)
        num_used += tl.sum((ends > starts).to(tl.int32), 0)
    return num_used


@triton.jit(do_not_specialize=["num_tiles"])
def _persistent_kernel(
    a_blocks,
    b_blocks,
    out_ptr,
    pairs_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_out,
    depth,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_columns = num_out // (BLOCK if IS_GATED else 2 * BLOCK)
    num_used = _num_used(tile_start_ptr, tile_end_ptr, num_tiles)
    for i in tl.range(tl.program_id(0), num_used * num_columns, tl.num_programs(0), flatten=True):
        # GROUP tiles of rows for one block of columns, then the next block of columns.
        group = i // (GROUP * num_columns)
        in_group = i % (GROUP * num_columns)
        group_size = tl.minimum(num_used - group * GROUP, GROUP)
        m = group * GROUP + in_group % group_size
        n = in_group // group_size
        start = tl.load(tile_start_ptr + m)
        end = tl.load(tile_end_ptr + m)
        expert = tl.load(tile_expert_ptr + m)
        if IS_GATED:
            b_first, b_row = expert * 2, n * BLOCK
        else:
            b_first, b_row = expert * (num_out // BLOCK) + n * 2, 0
        acc = tl.zeros((ROWS, 2 * BLOCK), tl.float32)
        for k in range(0, depth, DEPTH):
            a = a_blocks.load([start, k])
            b = b_blocks.load([b_first, b_row, k]).reshape((2 * BLOCK, DEPTH))
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, BLOCK)), (0, 2, 1)))
        rows = start + tl.arange(0, ROWS)
        is_row = rows < end
        columns = tl.arange(0, BLOCK)
        if IS_GATED:
            h = left * right / (1.0 + tl.exp(-right))
            out = out_ptr + rows.to(tl.int64)[:, None] * num_out + (n * BLOCK + columns)[None, :]
            tl.store(out, h.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
        else:
            pairs = tl.load(pairs_ptr + rows, mask=is_row, other=0).to(tl.int64)
            out = out_ptr + pairs[:, None] * num_out + (n * 2 * BLOCK + columns)[None, :]
            tl.store(out, left.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
            tl.store(out + BLOCK, right.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
