# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Between the projections of MLA and its attention, in one pass over a token's row: the latent's norm, the
rotation of the shared key, their way into the cache, and the rotation of the queries.

T tokens, H heads, C latent rank, N query dims without position, R rotated dims (interleaved pairs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.mla_fp8_cache import store_fp8_row
from engine.kernels.row_task import RowTask
from engine.kernels.support import is_power_of_two


def prepare_mla_rows(
    task: RowTask,
    rows_TC: torch.Tensor,
    q_THQ: torch.Tensor,
    q_rope_out_THR: torch.Tensor,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """rows [T, C + R] (latent, shared key) are normed, rotated and left in place, and copied to their slots;
    a slot below 0 has no place in the cache. The last R dims of q [T, H, N + R] go rotated to q_rope_out,
    which may be the same memory. Positions and slots are int64."""
    num_tokens, num_heads, q_size = q_THQ.shape
    if num_tokens == 0:
        return
    rope = q_rope_out_THR.shape[-1]
    rank = rows_TC.shape[-1] - rope
    assert is_power_of_two(rank) and is_power_of_two(rope)
    _rows_kernel[(num_tokens,)](
        rows_TC,
        q_THQ,
        q_rope_out_THR,
        task.norm_weight_C,
        task.inverse_freq_R,
        positions_T,
        slot_mapping_T,
        cache,
        rows_TC.stride(0),
        q_THQ.stride(0),
        q_THQ.stride(1),
        q_rope_out_THR.stride(0),
        q_rope_out_THR.stride(1),
        q_size - rope,
        num_heads,
        task.norm_eps,
        task.magnitude,
        RANK=rank,
        ROPE=rope,
        HEADS=triton.next_power_of_2(num_heads),
        num_warps=4,
        **launch_options(num_tokens),
    )


@triton.jit
def _rows_kernel(
    rows_ptr,
    q_ptr,
    q_out_ptr,
    weight_ptr,
    freq_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    rows_stride,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    nope,
    num_heads,
    eps,
    magnitude,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    row = rows_ptr + t * rows_stride
    cos, sin = store_row(
        row, weight_ptr, freq_ptr, positions_ptr, slots_ptr, cache_ptr, t, eps, magnitude, RANK, ROPE, True
    )
    q = q_ptr + t * q_stride_t + nope
    q_out = q_out_ptr + t * out_stride_t
    rotate_queries(q, q_out, q_stride_h, out_stride_h, num_heads, cos, sin, HEADS, ROPE)


@triton.jit
def store_row(
    row,
    weight_ptr,
    freq_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    t,
    eps,
    magnitude,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    IN_PLACE: tl.constexpr = False,
):
    """The latent normed and the key rotated, into the slot of row t, and in place if wanted; cosine and sine
    of its position. In place they are exact whatever the cache holds: a chunk sees itself so, and with a
    cache in FP8 what follows depends a little on how a prompt was cut."""
    slot = tl.load(slots_ptr + t)
    dims = tl.arange(0, RANK)
    pairs = tl.arange(0, ROPE // 2)
    rope_dims = tl.arange(0, ROPE)
    key = row + RANK
    latent = tl.load(row + dims).to(tl.float32)
    key_even = tl.load(key + 2 * pairs).to(tl.float32)
    key_odd = tl.load(key + 2 * pairs + 1).to(tl.float32)
    latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / RANK + eps)
    latent = latent * tl.load(weight_ptr + dims).to(tl.float32)
    rounded = latent.to(row.dtype.element_ty)
    angles = tl.load(positions_ptr + t).to(tl.float32) * tl.load(freq_ptr + pairs)
    cos = tl.cos(angles) * magnitude
    sin = tl.sin(angles) * magnitude
    rotated = tl.interleave(key_even * cos - key_odd * sin, key_even * sin + key_odd * cos)
    rotated = rotated.to(row.dtype.element_ty)
    if cache_ptr.dtype.element_ty == tl.uint8:
        store_fp8_row(cache_ptr, slot, latent, rotated, RANK, ROPE)
    else:
        slot_row = cache_ptr + slot * (RANK + ROPE)
        tl.store(slot_row + dims, rounded, mask=dims * 0 + slot >= 0)
        tl.store(slot_row + RANK + rope_dims, rotated, mask=rope_dims * 0 + slot >= 0)
    if IN_PLACE:
        tl.debug_barrier()  # all threads have read before one writes
        tl.store(row + dims, rounded)
        tl.store(key + rope_dims, rotated)
    return cos, sin


@triton.jit
def rotate_queries(
    q_ptr,
    out_ptr,
    q_stride_h,
    out_stride_h,
    num_heads,
    cos,
    sin,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Of a row: the rotated dims of each head, from where q_ptr points to where out_ptr does."""
    heads = tl.arange(0, HEADS)[:, None]
    is_head = heads < num_heads
    pairs = tl.arange(0, ROPE // 2)
    q = q_ptr + heads * q_stride_h + 2 * pairs[None, :]
    even = tl.load(q, mask=is_head, other=0.0).to(tl.float32)
    odd = tl.load(q + 1, mask=is_head, other=0.0).to(tl.float32)
    tl.debug_barrier()  # it may be in place: all threads have read before one writes
    cos = cos[None, :]
    sin = sin[None, :]
    rotated = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
    out = out_ptr + heads * out_stride_h + tl.arange(0, ROPE)[None, :]
    tl.store(out, rotated.to(out_ptr.dtype.element_ty), mask=is_head)
