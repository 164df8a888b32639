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
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t)
    dims = tl.arange(0, RANK)
    pairs = tl.arange(0, ROPE // 2)
    heads = tl.arange(0, HEADS)[:, None]
    is_head = heads < num_heads
    row = rows_ptr + t * rows_stride
    key = row + RANK
    q = q_ptr + t * q_stride_t + heads * q_stride_h + nope + 2 * pairs[None, :]
    latent = tl.load(row + dims).to(tl.float32)
    key_even = tl.load(key + 2 * pairs).to(tl.float32)
    key_odd = tl.load(key + 2 * pairs + 1).to(tl.float32)
    q_even = tl.load(q, mask=is_head, other=0.0).to(tl.float32)
    q_odd = tl.load(q + 1, mask=is_head, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the work is in place: all threads have read before one writes

    latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / RANK + eps)
    latent = (latent * tl.load(weight_ptr + dims).to(tl.float32)).to(rows_ptr.dtype.element_ty)
    angles = tl.load(positions_ptr + t).to(tl.float32) * tl.load(freq_ptr + pairs)
    cos = tl.cos(angles) * magnitude
    sin = tl.sin(angles) * magnitude
    rotated = tl.interleave(key_even * cos - key_odd * sin, key_even * sin + key_odd * cos)
    rotated = rotated.to(rows_ptr.dtype.element_ty)
    slot_row = cache_ptr + slot * (RANK + ROPE)
    rope_dims = tl.arange(0, ROPE)
    tl.store(row + dims, latent)
    tl.store(key + rope_dims, rotated)
    tl.store(slot_row + dims, latent, mask=dims * 0 + slot >= 0)
    tl.store(slot_row + RANK + rope_dims, rotated, mask=rope_dims * 0 + slot >= 0)
    cos = cos[None, :]
    sin = sin[None, :]
    q_rotated = tl.interleave(q_even * cos - q_odd * sin, q_even * sin + q_odd * cos)
    out = q_out_ptr + t * out_stride_t + heads * out_stride_h + rope_dims[None, :]
    tl.store(out, q_rotated.to(q_out_ptr.dtype.element_ty), mask=is_head)
