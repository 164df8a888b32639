# ruff: noqa: PLR0913, PLR0915 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The kernel of attention_decode over a cache in FP8.

Latents are multiplied as they are stored; a row's scale goes into its scores and its probabilities. Even and
odd latents lie in two halves of every tile, as split_pairs gives them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.dependent_launch import signal, wait
from engine.kernels.mla_fp8_cache import latent_pairs_at, rotated_at, scales_at, split_pairs


@triton.jit
def decode_fp8_kernel(
    q_ptr,
    cache_ptr,
    tables_ptr,
    context_ptr,
    parts_ptr,
    mass_ptr,
    q_stride_s,
    q_stride_h,
    table_stride,
    num_heads,
    num_shares,
    IS_SHARED: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    s = tl.program_id(0)
    share = tl.program_id(2)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_heads
    latent_dims = tl.arange(0, RANK)
    pair_dims = tl.arange(0, RANK // 2)
    rope_dims = tl.arange(0, ROPE)
    context = tl.load(context_ptr + s)
    rows_per_share = tl.cdiv(tl.cdiv(context, num_shares), ROWS) * ROWS
    begin = share * rows_per_share
    end = tl.minimum(begin + rows_per_share, context)

    q_base = q_ptr + s.to(tl.int64) * q_stride_s + heads[:, None] * q_stride_h
    q_latent = tl.load(q_base + latent_dims[None, :], mask=is_head[:, None], other=0.0)
    q_even, q_odd = tl.split(tl.reshape(q_latent, [HEADS, RANK // 2, 2]))
    q_rope = tl.load(q_base + RANK + rope_dims[None, :], mask=is_head[:, None], other=0.0)
    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc_even = tl.zeros([HEADS, RANK // 2], tl.float32)
    acc_odd = tl.zeros([HEADS, RANK // 2], tl.float32)
    table = tables_ptr + s.to(tl.int64) * table_stride
    for start in range(begin, end, ROWS):
        places = start + tl.arange(0, ROWS)
        is_row = (places >= FIRST) & (places < end)
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_row, other=0).to(tl.int64)
        slots = blocks * BLOCK_SIZE + places % BLOCK_SIZE
        pairs_at = latent_pairs_at(cache_ptr, slots, RANK, ROPE)[:, None] + pair_dims[None, :]
        rope_at = rotated_at(cache_ptr, slots, RANK, ROPE)[:, None] + rope_dims[None, :]
        pairs = tl.load(pairs_at, mask=is_row[:, None], other=0)
        rope = tl.load(rope_at, mask=is_row[:, None], other=0.0).to(q_rope.dtype)
        scales = tl.load(scales_at(cache_ptr, slots, RANK, ROPE), mask=is_row, other=0.0)
        even, odd = split_pairs(pairs, q_latent.dtype)
        scores = tl.dot(q_even, tl.trans(even), input_precision=PRECISION)
        scores = tl.dot(q_odd, tl.trans(odd), acc=scores, input_precision=PRECISION)
        scores *= scales[None, :]
        scores = tl.dot(q_rope, tl.trans(rope), acc=scores, input_precision=PRECISION)
        scores = tl.where(is_row[None, :], scores * 1.4426950408889634, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        probs = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        weights = (probs * scales[None, :]).to(q_latent.dtype)
        acc_even = tl.dot(weights, even, acc=acc_even * shrink[:, None], input_precision=PRECISION)
        acc_odd = tl.dot(weights, odd, acc=acc_odd * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    mass = tl.where(total > 0, total, 1.0)
    acc = tl.interleave(acc_even, acc_odd) / mass[:, None]
    place = (s.to(tl.int64) * num_heads + heads) * num_shares + share
    out = parts_ptr + place[:, None] * RANK + latent_dims[None, :]
    tl.store(out, acc.to(parts_ptr.dtype.element_ty), mask=is_head[:, None])
    if IS_SHARED:
        log_mass = tl.where(total > 0, largest + tl.log2(mass), -float("inf"))
        tl.store(mass_ptr + place, log_mass, mask=is_head)
