# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,no-untyped-call"
"""The FP8 products of many rows on Hopper, in Gluon: warps with roles instead of warps that all do the same.

A program stays on its multiprocessor and takes tile after tile: 128 sorted pairs of one expert, by two blocks
of 128 columns. The blocks are up and gate of the same columns for the first product, neighbours for the
second. It has nine warps:

- One copies. Stage by stage it starts copies of 128 bytes of depth, of both blocks and of the rows, into a
  ring in shared memory, and goes on through the ends of tiles: loads never wait for results.
- Two groups of four multiply, each its half of the rows by both blocks. What a stage adds is a sum of its
  own, which goes to the float32 accumulators with the scales of its rows and of its block; while one group
  does that, the other keeps the tensor cores busy. A half without rows is not multiplied, so the tail of an
  expert costs 64 rows and not 128. The first product writes its results quantised: a tile holds the 128
  columns that share a scale.

They meet at two barriers a stage. `is_full`: the bytes that the copying warp announced are there; both groups
wait for it. `is_empty`: both groups have read the stage; the copying warp waits for it. A barrier's phases
alternate between 0 and 1, a wait names the one that must be over. The n-th stage since the program began is
the n // STAGES-th use of its slot, so it is filled in phase n // STAGES & 1, and may be filled when the phase
before that is over; before the first use, that holds at once.

Neither Triton's interpreter nor another generation of devices runs it: engine/moe/specialised.py decides.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.fp8_quantise import Fp8Rows, quantise_rows
from engine.kernels.moe_choice import Route
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gather import gather_rows
from engine.kernels.moe_gemm import ExpertWeights

_PART_ROWS = 64  # of a group of four warps
_STAGES = 4
_GROUP = 8  # tiles of rows that share their weights' way through the cache

# Names differ between releases of Triton.
_copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def run_products_specialised(
    x_TD: torch.Tensor, route: Route, spec: GateSpec, weights: ExpertWeights
) -> torch.Tensor:
    """[P, D], pair p in row p; x is bf16, D and I are multiples of 128."""
    h = multiply_up_gate_specialised(quantise_rows(x_TD), weights, route, spec)
    return multiply_down_specialised(h, weights, route)


def multiply_up_gate_specialised(x: Fp8Rows, weights: ExpertWeights, route: Route, spec: GateSpec) -> Fp8Rows:
    """[P, I] in the order of sorted pairs; x [T, D]. The shared experts get every token, in order: their rows
    are those of x, only the others are gathered."""
    num_routed, size = x.values.shape[0] * spec.top_k, weights.down.shape[2]
    num_pairs = route.sorted_pairs_P.shape[0]
    assert weights.up_gate_scale is not None
    a = gather_rows(x, route, num_routed, spec.experts_per_token)
    out = Fp8Rows(x.values.new_empty(num_pairs, size), x.scales.new_empty(num_pairs, size // FP8_GROUP))
    _launch(a, x.values, weights.up_gate, weights.up_gate_scale, out.values, out.scales, route, num_routed)
    return out


def multiply_down_specialised(h: Fp8Rows, weights: ExpertWeights, route: Route) -> torch.Tensor:
    """[P, D], pair p in row p; h [P, I] in the order of sorted pairs."""
    num_pairs = h.values.shape[0]
    assert weights.down_scale is not None
    out = torch.empty(num_pairs, weights.down.shape[1], dtype=torch.bfloat16, device=h.values.device)
    _launch(h, None, weights.down, weights.down_scale, out, None, route, num_pairs)
    return out


def _launch(
    a: Fp8Rows,
    shared: torch.Tensor | None,
    b_ENK: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    route: Route,
    num_routed: int,
) -> None:
    """shared: rows of the shared experts, of the first product only."""
    a_blocks = _blocks(a.values, _PART_ROWS)
    shared_blocks = a_blocks if shared is None else _blocks(shared, _PART_ROWS)
    num_tiles = route.tile_expert_M.shape[0]
    num_columns = triton.cdiv(out.shape[1], FP8_GROUP if shared is not None else 2 * FP8_GROUP)
    _specialised_kernel[(min(_num_multiprocessors(out.device), num_tiles * num_columns),)](
        a_blocks,
        shared_blocks,
        _blocks(b_ENK.flatten(0, 1), FP8_GROUP),
        a.scales,
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
        STAGES=_STAGES,
        GROUP=_GROUP,
        num_warps=4,
    )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(matrix: torch.Tensor, num_rows: int) -> TensorDescriptor:
    """Of so many rows and a stage's depth, swizzled as the matrix units want them."""
    shape = [num_rows, FP8_GROUP]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv)
    return TensorDescriptor.from_tensor(matrix, shape, layout)


@gluon.jit
def _num_column_blocks(num_out, IS_GATED: gl.constexpr):
    """Of the columns that one tile has."""
    if IS_GATED:
        num = num_out // 128
    else:
        num = (num_out + 255) // 256
    return num


@gluon.jit
def _tile_of(i, num_tiles, num_columns, GROUP: gl.constexpr):
    """Tile of rows and block of columns: GROUP tiles of rows for one block, then the next block."""
    group = i // (GROUP * num_columns)
    in_group = i % (GROUP * num_columns)
    group_size = gl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + in_group % group_size, in_group // group_size


@gluon.jit
def _first_b_row(expert, n, num_out, IS_GATED: gl.constexpr):
    """Of the first block, and how far the second is. A last block without a neighbour is multiplied twice and
    stored once."""
    if IS_GATED:
        row, step = expert * 2 * num_out + n * 128, num_out
    else:
        row, step = expert * num_out + n * 256, gl.minimum(num_out - n * 256 - 128, 128)
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
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    B_BYTES: gl.constexpr = 2 * b_blocks.block_type.nbytes
    A_BYTES: gl.constexpr = a_blocks.block_type.nbytes
    num_columns = _num_column_blocks(num_out, IS_GATED)
    count = 0
    for i in range(gl.program_id(0), num_tiles * num_columns, gl.num_programs(0)):
        m, n = _tile_of(i, num_tiles, num_columns, GROUP)
        start = gl.load(tile_start_ptr + m)
        end = gl.load(tile_end_ptr + m)
        if end > start:
            b_row, b_step = _first_b_row(gl.load(tile_expert_ptr + m), n, num_out, IS_GATED)
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
                _copy_block(b_blocks, [b_row, k], full, b_stage.slice(0, 128))
                _copy_block(b_blocks, [b_row + b_step, k], full, b_stage.slice(128, 128))
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
    """Half by half, so that the change of layout needs little shared memory."""
    HALF: gl.constexpr = x.shape[1] // 2
    left, right = _halves(x)
    _store_block(left, out_ptr, out_rows_ptr, first, end, column, num_out, IS_GATED)
    _store_block(right, out_ptr, out_rows_ptr, first, end, column + HALF, num_out, IS_GATED)


@gluon.jit
def _release(is_empty, count, STAGES: gl.constexpr):
    """Once all warps of this group have read the stage before `count`, one of them says so."""
    _barrier()
    mbarrier.arrive(is_empty.index((count - 1) % STAGES), count=1)


@gluon.jit
def _multiply_tile(
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
    STAGES: gl.constexpr,
):
    """Sums of both blocks, and the count of stages after them. A product does not add to the sums `part` of
    the one before, but takes over their registers: two such sums beside two accumulators would not fit."""
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    part = gl.zeros([PART, 128], gl.float32, layout=MMA)
    left, right = part, part
    rows = first + gl.arange(0, PART, layout=gl.SliceLayout(1, MMA))
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
        left += part * (row_scale * left_scale)[:, None]
        # Nothing to wait for: keeps the next product, and its registers, behind the sum.
        left = warpgroup_mma_wait(0, deps=(left,))
        part = warpgroup_mma(a, b.slice(128, 128).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        _release(is_empty, count, STAGES)
        right += part * (row_scale * right_scale)[:, None]
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
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """What a group of four warps does: the rows of half INDEX of every tile."""
    PART: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    num_columns = _num_column_blocks(num_out, IS_GATED)
    count = 0
    for i in range(gl.program_id(0), num_tiles * num_columns, gl.num_programs(0)):
        m, n = _tile_of(i, num_tiles, num_columns, GROUP)
        first = gl.load(tile_start_ptr + m) + INDEX * PART
        end = gl.load(tile_end_ptr + m)
        if end > first:
            expert = gl.load(tile_expert_ptr + m)
            b_row, b_step = _first_b_row(expert, n, num_out, IS_GATED)
            left, right, count = _multiply_tile(
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
                STAGES,
            )
            if IS_GATED:
                h = left * right / (1.0 + gl.exp(-right))
                scale = gl.maximum(gl.max(gl.abs(h), 1), 1e-12) / 448.0
                h_rows = first + gl.arange(0, PART, layout=scale.type.layout)
                gl.store(out_scale_ptr + h_rows * (num_out // 128) + n, scale, mask=h_rows < end)
                h = (h / scale[:, None]).to(out_ptr.dtype.element_ty)
                _store(h, out_ptr, pairs_ptr, first, end, n * 128, num_out, IS_GATED)
            else:
                left = left.to(out_ptr.dtype.element_ty)
                right = right.to(out_ptr.dtype.element_ty)
                _store(left, out_ptr, pairs_ptr, first, end, n * 256, num_out, IS_GATED)
                _store(right, out_ptr, pairs_ptr, first, end, n * 256 + 128, num_out, IS_GATED)
        elif end > first - INDEX * PART:
            # The other group has rows, this one has none: the stages are not for it, but need its word.
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
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    PART: gl.constexpr = a_blocks.block_type.shape[0]
    DEPTH: gl.constexpr = a_blocks.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_blocks.dtype, [2 * STAGES, PART, DEPTH], a_blocks.layout)
    b_ring = gl.allocate_shared_memory(b_blocks.dtype, [STAGES, 256, DEPTH], b_blocks.layout)
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
                    UPPER, IS_GATED, STAGES, GROUP,
                ),
            ),
            (
                _multiply,
                (
                    a_ring, b_ring, is_full, is_empty, a_scale_ptr, b_scale_ptr, out_ptr, out_scale_ptr,
                    pairs_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_out, depth,
                    LOWER, IS_GATED, STAGES, GROUP,
                ),
            ),
            (
                _copy,
                (
                    a_blocks, shared_blocks, b_blocks, a_ring, b_ring, is_full, is_empty,
                    tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_out, depth, num_routed,
                    num_tokens, IS_GATED, STAGES, GROUP,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
