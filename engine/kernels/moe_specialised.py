# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,no-untyped-call"
"""The grouped products of many rows on Hopper: one warp copies, two groups of four warps multiply.

Each program stays on its multiprocessor and takes tile after tile, of 128 rows (two halves of 64) by two
blocks of columns. The copying warp fills a ring of stages, through the ends of tiles, so loads never wait for
a result to be written. Each group of four warps owns one half of the rows; a half without rows is not
multiplied, so a tail costs 64 rows and not 128. The blocks of columns are up and gate of the same columns
for the first product, neighbours for the second.

FP8: every 128 of depth the sum of a block goes to float32 accumulators with the scales of its rows and its
columns; while one group of warps does that, the other keeps the tensor cores busy. The first product writes
its results quantised: a tile holds the 128 columns that share a scale.

Columns are multiples of two blocks, depth of 128 bytes. Neither Triton's interpreter nor another generation
of devices runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.fp8_quantise import FP8_GROUP, Fp8Rows, quantise_rows
from engine.kernels.moe_choice import Route
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gather import gather_fp8_rows, gather_rows
from engine.kernels.moe_gemm import ExpertWeights

_PART_ROWS = 64  # of a group of four warps
_ROW_BYTES = 128  # of one stage: what the copy engine's swizzle spans

# Names differ between releases of Triton.
_copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@dataclass(frozen=True, slots=True)
class SpecialisedTile:
    block: int = 128  # columns of one of the two blocks
    num_stages: int = 4
    group: int = 8  # tiles of rows that share their weights' way through the cache


@dataclass(frozen=True, slots=True)
class SpecialisedTiles:
    up_gate: SpecialisedTile = SpecialisedTile()
    down: SpecialisedTile = SpecialisedTile()

    @property
    def rows(self) -> int:
        return 2 * _PART_ROWS


def run_products_specialised(
    x_TD: torch.Tensor, route: Route, spec: GateSpec, weights: ExpertWeights, tiles: SpecialisedTiles
) -> torch.Tensor:
    """[P, D], pair p in row p; x is bf16."""
    x = quantise_rows(x_TD) if weights.is_fp8 else x_TD
    h = multiply_up_gate_specialised(x, weights, route, spec, tiles.up_gate)
    if weights.is_fp8 and isinstance(h, torch.Tensor):
        h = quantise_rows(h)
    return multiply_down_specialised(h, weights, route, tiles.down)


def multiply_up_gate_specialised(
    x: torch.Tensor | Fp8Rows, weights: ExpertWeights, route: Route, spec: GateSpec, tile: SpecialisedTile
) -> torch.Tensor | Fp8Rows:
    """[P, I] in the order of sorted pairs; x [T, D]. FP8 rows give FP8 rows where a tile has all columns of a
    scale. The shared experts get every token, in order: their rows are those of x, only the others are
    gathered."""
    rows = x.values if isinstance(x, Fp8Rows) else x
    num_routed, size = rows.shape[0] * spec.top_k, weights.down.shape[2]
    num_pairs = route.sorted_pairs_P.shape[0]
    scales = None
    a: torch.Tensor | Fp8Rows
    if isinstance(x, Fp8Rows):
        a = gather_fp8_rows(x, route, num_routed, spec.experts_per_token)
        if tile.block == FP8_GROUP:
            scales = x.scales.new_empty(num_pairs, size // FP8_GROUP)
    else:
        a = gather_rows(x, route, num_routed, spec.experts_per_token)
    dtype = torch.bfloat16 if scales is None else torch.float8_e4m3fn
    out = torch.empty(num_pairs, size, dtype=dtype, device=rows.device)
    _launch(a, rows, weights.up_gate, weights.up_gate_scale, out, scales, route, tile, num_routed)
    return out if scales is None else Fp8Rows(out, scales)


def multiply_down_specialised(
    h: torch.Tensor | Fp8Rows, weights: ExpertWeights, route: Route, tile: SpecialisedTile
) -> torch.Tensor:
    """[P, D], pair p in row p; h [P, I] in the order of sorted pairs."""
    rows = h.values if isinstance(h, Fp8Rows) else h
    out = torch.empty(rows.shape[0], weights.down.shape[1], dtype=torch.bfloat16, device=rows.device)
    _launch(h, None, weights.down, weights.down_scale, out, None, route, tile, rows.shape[0])
    return out


def _launch(
    a: torch.Tensor | Fp8Rows,
    shared: torch.Tensor | None,
    b_ENK: torch.Tensor,
    b_scale: torch.Tensor | None,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    route: Route,
    tile: SpecialisedTile,
    num_routed: int,
) -> None:
    rows, a_scale = (a.values, a.scales) if isinstance(a, Fp8Rows) else (a, None)
    depth = _ROW_BYTES // rows.element_size()
    a_blocks = _blocks(rows, _PART_ROWS, depth)
    shared_blocks = a_blocks if shared is None else _blocks(shared, _PART_ROWS, depth)
    b_blocks = _blocks(b_ENK.flatten(0, 1), tile.block, depth)
    num_tiles = route.tile_expert_M.shape[0]
    columns = tile.block * (1 if shared is not None else 2)
    num_programs = min(_num_multiprocessors(out.device), num_tiles * (out.shape[1] // columns))
    _specialised_kernel[(num_programs,)](
        a_blocks,
        shared_blocks,
        b_blocks,
        a_scale,
        b_scale,
        out,
        out_scale,
        route.sorted_pairs_P,
        route.tile_expert_M,
        route.tile_start_M,
        route.tile_end_M,
        num_tiles,
        out.shape[1],
        b_ENK.shape[2],
        num_routed,
        1 if shared is None else shared.shape[0],
        IS_GATED=shared is not None,
        IS_FP8=b_scale is not None,
        QUANTISES=out_scale is not None,
        BLOCK=tile.block,
        STAGES=tile.num_stages,
        GROUP=tile.group,
        num_warps=4,
    )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(matrix: torch.Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for([num_rows, num_columns], dtype)
    return TensorDescriptor.from_tensor(matrix, [num_rows, num_columns], layout)


@gluon.jit
def _tile_of(i, num_tiles, num_columns, GROUP: gl.constexpr):
    """Tile of rows and block of columns: GROUP tiles of rows for one block, then the next block."""
    group = i // (GROUP * num_columns)
    in_group = i % (GROUP * num_columns)
    group_size = gl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + in_group % group_size, in_group // group_size


@gluon.jit
def _first_b_row(expert, n, num_out, IS_GATED: gl.constexpr, BLOCK: gl.constexpr):
    """Of the first block, and how far the second is."""
    if IS_GATED:
        row, step = expert * 2 * num_out + n * BLOCK, num_out
    else:
        row, step = expert * num_out + n * 2 * BLOCK, num_out * 0 + BLOCK
    return row, step


@gluon.jit
def _copy(
    a_blocks,
    shared_blocks,
    b_blocks,
    a_ring,
    b_ring,
    is_full,
    is_empty,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_out,
    depth,
    num_routed,
    num_tokens,
    IS_GATED: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    B_BYTES: gl.constexpr = 2 * b_blocks.block_type.nbytes
    A_BYTES: gl.constexpr = a_blocks.block_type.nbytes
    num_columns = num_out // (BLOCK if IS_GATED else 2 * BLOCK)
    count = 0
    for i in range(gl.program_id(0), num_tiles * num_columns, gl.num_programs(0)):
        m, n = _tile_of(i, num_tiles, num_columns, GROUP)
        start = gl.load(tile_start_ptr + m)
        end = gl.load(tile_end_ptr + m)
        if end > start:
            b_row, b_step = _first_b_row(gl.load(tile_expert_ptr + m), n, num_out, IS_GATED, BLOCK)
            has_two = end > start + PART
            for k in range(0, depth, DEPTH):
                slot = count % STAGES
                full = is_full.index(slot)
                mbarrier.wait(is_empty.index(slot), (count // STAGES & 1) ^ 1)
                if has_two:
                    mbarrier.expect(full, B_BYTES + 2 * A_BYTES)
                else:
                    mbarrier.expect(full, B_BYTES + A_BYTES)
                b_stage = b_ring.index(slot)
                _copy_block(b_blocks, [b_row, k], full, b_stage.slice(0, BLOCK))
                _copy_block(b_blocks, [b_row + b_step, k], full, b_stage.slice(BLOCK, BLOCK))
                if start < num_routed:
                    _copy_block(a_blocks, [start, k], full, a_ring.index(2 * slot))
                    if has_two:
                        _copy_block(a_blocks, [start + PART, k], full, a_ring.index(2 * slot + 1))
                else:
                    row = (start - num_routed) % num_tokens
                    _copy_block(shared_blocks, [row, k], full, a_ring.index(2 * slot))
                    if has_two:
                        _copy_block(shared_blocks, [row + PART, k], full, a_ring.index(2 * slot + 1))
                count += 1


@gluon.jit
def _store_block(x, out_ptr, out_rows_ptr, first, end, column, num_out, IS_GATED: gl.constexpr):
    """x [PART, 64] to rows first .. end of sorted pairs, or to where their pairs are."""
    BYTES: gl.constexpr = x.dtype.primitive_bitwidth // 8
    PER_THREAD: gl.constexpr = 16 // BYTES
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, PER_THREAD], [32 * PER_THREAD // x.shape[1], x.shape[1] // PER_THREAD], [4, 1], [1, 0]
    )
    rows = first + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = column + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    is_row = rows < end
    out_rows = rows
    if not IS_GATED:
        out_rows = gl.load(out_rows_ptr + rows, mask=is_row, other=0)
    out = out_ptr + out_rows.to(gl.int64)[:, None] * num_out + columns[None, :]
    mask = gl.expand_dims(is_row, 1) & (gl.expand_dims(columns, 0) < num_out)
    gl.store(out, gl.convert_layout(x, LAYOUT), mask=mask)


@gluon.jit
def _halves(x):
    """Left and right columns; both are in the registers of the threads that hold x."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _store(x, out_ptr, out_rows_ptr, first, end, column, num_out, IS_GATED: gl.constexpr):
    """In pieces of 64 columns, so that the change of layout needs little shared memory."""
    if x.shape[1] > 64:
        left, right = _halves(x)
        HALF: gl.constexpr = x.shape[1] // 2
        _store(left, out_ptr, out_rows_ptr, first, end, column, num_out, IS_GATED)
        _store(right, out_ptr, out_rows_ptr, first, end, column + HALF, num_out, IS_GATED)
    else:
        _store_block(x, out_ptr, out_rows_ptr, first, end, column, num_out, IS_GATED)


@gluon.jit
def _release(is_empty, count, STAGES: gl.constexpr):
    """The stage before `count` is read by all warps of this group."""
    _barrier()
    mbarrier.arrive(is_empty.index((count - 1) % STAGES), count=1)


@gluon.jit
def _multiply_bf16(
    a_ring,
    b_ring,
    is_full,
    is_empty,
    count,
    depth,
    INDEX: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Both blocks as one product of 2 * BLOCK columns."""
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK, 16])
    acc = gl.zeros([PART, 2 * BLOCK], gl.float32, layout=MMA)
    for k in range(0, depth, DEPTH):
        slot = count % STAGES
        mbarrier.wait(is_full.index(slot), count // STAGES & 1)
        b = b_ring.index(slot).permute((1, 0))
        token = warpgroup_mma(a_ring.index(2 * slot + INDEX), b, warpgroup_mma_init(acc), is_async=True)
        acc = warpgroup_mma_wait(1, deps=(token,))
        if k > 0:
            _release(is_empty, count, STAGES)
        count += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _release(is_empty, count, STAGES)
    left, right = _halves(acc)
    return left, right, count


@gluon.jit
def _multiply_fp8(
    a_ring,
    b_ring,
    is_full,
    is_empty,
    count,
    depth,
    a_scale_ptr,
    first,
    end,
    left_scale_ptr,
    right_scale_ptr,
    INDEX: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Both blocks as one product where the registers suffice for its sums beside the accumulators. A product
    does not add to the sums `part` of the one before, but takes over their registers."""
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    part = gl.zeros([PART, 128], gl.float32, layout=MMA)
    if BLOCK == 128:
        left, right = part, part
    else:
        left, right = _halves(part)
    rows = first + gl.arange(0, PART, layout=gl.SliceLayout(1, left.type.layout))
    row_offsets = gl.minimum(rows, end - 1) * (depth // DEPTH)
    for k in range(depth // DEPTH):
        slot = count % STAGES
        mbarrier.wait(is_full.index(slot), count // STAGES & 1)
        count += 1
        row_scale = gl.load(a_scale_ptr + k + row_offsets)
        left_scale = gl.load(left_scale_ptr + k)
        right_scale = gl.load(right_scale_ptr + k)
        a, b = a_ring.index(2 * slot + INDEX), b_ring.index(slot)
        part = warpgroup_mma(a, b.slice(0, 128).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        if BLOCK == 128:
            left += part * (row_scale * left_scale)[:, None]
            # Nothing to wait for: keeps the next product, and its registers, behind the sum.
            left = warpgroup_mma_wait(0, deps=(left,))
            part = warpgroup_mma(a, b.slice(128, 128).permute((1, 0)), part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            _release(is_empty, count, STAGES)
            right += part * (row_scale * right_scale)[:, None]
        else:
            _release(is_empty, count, STAGES)
            left_part, right_part = _halves(part)
            left += left_part * (row_scale * left_scale)[:, None]
            right += right_part * (row_scale * right_scale)[:, None]
    return left, right, count


@gluon.jit
def _multiply(
    a_ring,
    b_ring,
    is_full,
    is_empty,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_out,
    depth,
    INDEX: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_FP8: gl.constexpr,
    QUANTISES: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One half of the rows of every tile."""
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    num_columns = num_out // (BLOCK if IS_GATED else 2 * BLOCK)
    count = 0
    for i in range(gl.program_id(0), num_tiles * num_columns, gl.num_programs(0)):
        m, n = _tile_of(i, num_tiles, num_columns, GROUP)
        first = gl.load(tile_start_ptr + m) + INDEX * PART
        end = gl.load(tile_end_ptr + m)
        if end > first:
            if IS_FP8:
                expert = gl.load(tile_expert_ptr + m)
                b_row, b_step = _first_b_row(expert, n, num_out, IS_GATED, BLOCK)
                left, right, count = _multiply_fp8(
                    a_ring,
                    b_ring,
                    is_full,
                    is_empty,
                    count,
                    depth,
                    a_scale_ptr,
                    first,
                    end,
                    b_scale_ptr + b_row // 128 * (depth // 128),
                    b_scale_ptr + (b_row + b_step) // 128 * (depth // 128),
                    INDEX,
                    BLOCK,
                    STAGES,
                )
            else:
                left, right, count = _multiply_bf16(
                    a_ring, b_ring, is_full, is_empty, count, depth, INDEX, BLOCK, STAGES
                )
            if IS_GATED:
                h = left * right / (1.0 + gl.exp(-right))
                if QUANTISES:
                    scale = gl.maximum(gl.max(gl.abs(h), 1), 1e-12) / 448.0
                    h_rows = first + gl.arange(0, PART, layout=scale.type.layout)
                    gl.store(out_scale_ptr + h_rows * (num_out // 128) + n, scale, mask=h_rows < end)
                    h = h / scale[:, None]
                _store(
                    h.to(out_ptr.dtype.element_ty),
                    out_ptr,
                    pairs_ptr,
                    first,
                    end,
                    n * BLOCK,
                    num_out,
                    IS_GATED,
                )
            else:
                column = n * 2 * BLOCK
                left = left.to(out_ptr.dtype.element_ty)
                right = right.to(out_ptr.dtype.element_ty)
                _store(left, out_ptr, pairs_ptr, first, end, column, num_out, IS_GATED)
                _store(right, out_ptr, pairs_ptr, first, end, column + BLOCK, num_out, IS_GATED)
        elif end > first - INDEX * PART:
            for _ in range(depth // DEPTH):
                mbarrier.wait(is_full.index(count % STAGES), count // STAGES & 1)
                count += 1
                _release(is_empty, count, STAGES)


@gluon.jit(do_not_specialize=["num_tiles", "num_routed", "num_tokens"])
def _specialised_kernel(
    a_blocks,
    shared_blocks,
    b_blocks,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_out,
    depth,
    num_routed,
    num_tokens,
    IS_GATED: gl.constexpr,
    IS_FP8: gl.constexpr,
    QUANTISES: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    PART: gl.constexpr = a_blocks.block_type.shape[0]
    DEPTH: gl.constexpr = a_blocks.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_blocks.dtype, [2 * STAGES, PART, DEPTH], a_blocks.layout)
    b_ring = gl.allocate_shared_memory(b_blocks.dtype, [STAGES, 2 * BLOCK, DEPTH], b_blocks.layout)
    is_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    is_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(is_full.index(stage), count=1)
        mbarrier.init(is_empty.index(stage), count=2)
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    a_ring, b_ring, is_full, is_empty, a_scale_ptr, b_scale_ptr, out_ptr, out_scale_ptr,
                    pairs_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_out, depth,
                    UPPER, IS_GATED, IS_FP8, QUANTISES, BLOCK, STAGES, GROUP,
                ),
            ),
            (
                _multiply,
                (
                    a_ring, b_ring, is_full, is_empty, a_scale_ptr, b_scale_ptr, out_ptr, out_scale_ptr,
                    pairs_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_out, depth,
                    LOWER, IS_GATED, IS_FP8, QUANTISES, BLOCK, STAGES, GROUP,
                ),
            ),
            (
                _copy,
                (
                    a_blocks, shared_blocks, b_blocks, a_ring, b_ring, is_full, is_empty,
                    tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_out, depth, num_routed,
                    num_tokens, IS_GATED, BLOCK, STAGES, GROUP,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
