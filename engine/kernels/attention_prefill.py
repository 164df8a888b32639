# ruff: noqa: PLR0913, PLR0915 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Causal MLA attention of prompt chunks, packed without padding, over expanded keys and values.

Each program takes a tile of one sequence's queries and one head through the rows that they can see (the
online softmax of T. Dao, "FlashAttention-2", 2023). The key is two parts: one of the head, expanded from the
latent, and a rotated one that all heads share and that is never copied.

In a graph the rows that the cache held before come apart from those of the chunks, as attention_context.py
leaves them. Where the tiles are few, several programs share the cached rows of one out; a second kernel
merges what they found.

T query rows of all sequences, L context rows of all sequences, H heads, P shares, N, R and V dims of a head's
key without position, of the shared rotated key, and of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    num_queries: int = 128
    num_keys: int = 64
    num_warps: int = 8
    num_stages: int = 3


_SHARED_TOKENS = 1024  # so many fill the device with a share each
_MAX_SHARES = 8
BF16_TUNING = PrefillTuning()
FP32_TUNING = PrefillTuning(num_queries=32, num_keys=32, num_warps=4, num_stages=1)


@dataclass(frozen=True, slots=True)
class Segments:
    """Sequence s has query rows query_start[s] .. query_start[s + 1], the last ones of its context rows
    context_start[s] .. context_start[s + 1]. A sequence may be empty."""

    query_start: torch.Tensor  # int32 [S + 1]
    context_start: torch.Tensor  # int32 [S + 1]


@dataclass(frozen=True, slots=True)
class CachedRows:
    """Rows start[s] .. start[s + 1] come before the context rows of sequence s. All of its queries see
    them."""

    key_value_LHK: torch.Tensor  # [L, H, N + V]
    rope_LR: torch.Tensor
    start: torch.Tensor  # int32 [S + 1]


def max_shares(num_rows: int) -> int:
    """Of the cached rows of a sequence, in a launch of so many queries."""
    return max(1, min(_MAX_SHARES, _SHARED_TOKENS // num_rows))


def mla_prefill(
    q_THQ: torch.Tensor,
    key_value_LHK: torch.Tensor,
    rope_LR: torch.Tensor,
    segments: Segments,
    tuning: PrefillTuning | None = None,
    *,
    cached: CachedRows | None = None,
    shares: int | None = None,
    out_THV: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, V] of queries [T, H, N + R] that carry the softmax scale; key_value [L, H, N + V]. Last
    dimensions must be contiguous. The launch depends on the shapes alone, so it can be part of a CUDA graph.
    shares: of the cached rows, at most. out: contiguous; its rows that belong to no sequence are left as they
    are, without it they are 0."""
    if tuning is None:
        tuning = FP32_TUNING if q_THQ.dtype == torch.float32 else BF16_TUNING
    rope = rope_LR.shape[1]
    num_rows, num_heads, q_size = q_THQ.shape
    nope = q_size - rope
    value = key_value_LHK.shape[2] - nope
    if out_THV is None:
        out_THV = q_THQ.new_zeros(num_rows, num_heads, value)
    assert out_THV.is_contiguous()
    num_seqs = segments.query_start.shape[0] - 1
    most_tiles = num_rows // tuning.num_queries + num_seqs  # each sequence may end in a part of a tile
    shares = 1 if cached is None else shares or max_shares(num_rows)
    before = cached or CachedRows(key_value_LHK, rope_LR, segments.context_start)
    parts_PTHV = q_THQ.new_empty(shares - 1, num_rows, num_heads, value, dtype=torch.float32)
    mass_PTH = parts_PTHV.new_full((shares if shares > 1 else 0, num_rows, num_heads), -torch.inf)
    _prefill_kernel[(num_heads, most_tiles)](
        q_THQ,
        key_value_LHK,
        rope_LR,
        segments.query_start,
        segments.context_start,
        before.key_value_LHK,
        before.rope_LR,
        before.start,
        out_THV,
        parts_PTHV,
        mass_PTH,
        q_THQ.stride(0),
        q_THQ.stride(1),
        key_value_LHK.stride(0),
        key_value_LHK.stride(1),
        rope_LR.stride(0),
        before.key_value_LHK.stride(0),
        before.key_value_LHK.stride(1),
        before.rope_LR.stride(0),
        num_rows,
        num_heads,
        num_seqs,
        shares,
        HAS_CACHED=cached is not None,
        IS_SHARED=shares > 1,
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        QUERIES=tuning.num_queries,
        KEYS=tuning.num_keys,
        PRECISION="ieee" if q_THQ.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    if shares > 1:
        _merge_kernel[(num_rows, num_heads)](
            out_THV,
            parts_PTHV,
            mass_PTH,
            num_rows,
            num_heads,
            shares,
            SHARES_TILE=triton.next_power_of_2(shares),
            VALUE=value,
            num_warps=1,
        )
    return out_THV


@triton.jit
def _attend_rows(
    acc,
    total,
    largest,
    q_nope,
    q_rope,
    kv_base,
    rope_base,
    kv_stride,
    rope_stride,
    begin,
    end,
    last_visible,
    IS_MASKED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    nope_dims = tl.arange(0, NOPE)
    rope_dims = tl.arange(0, ROPE)
    value_dims = tl.arange(0, VALUE)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        kv_rows = kv_base + keys.to(tl.int64) * kv_stride
        rope_rows = rope_base + keys.to(tl.int64) * rope_stride
        if IS_MASKED:
            is_key = (keys < end)[:, None]
            key_nope = tl.load(kv_rows[:, None] + nope_dims[None, :], mask=is_key, other=0.0)
            key_rope = tl.load(rope_rows[:, None] + rope_dims[None, :], mask=is_key, other=0.0)
            value = tl.load(kv_rows[:, None] + NOPE + value_dims[None, :], mask=is_key, other=0.0)
        else:
            key_nope = tl.load(kv_rows[:, None] + nope_dims[None, :])
            key_rope = tl.load(rope_rows[:, None] + rope_dims[None, :])
            value = tl.load(kv_rows[:, None] + NOPE + value_dims[None, :])
        scores = tl.dot(q_nope, tl.trans(key_nope), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(key_rope), acc=scores, input_precision=PRECISION)
        scores = scores * 1.4426950408889634
        if IS_MASKED:
            scores = tl.where(keys[None, :] <= last_visible[:, None], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        probs = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(value.dtype), value, acc=acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    return acc, total, largest


@triton.jit
def _find_tile(place, query_start_ptr, num_seqs, QUERIES: tl.constexpr):
    """Sequence, or -1, and tile in it, of a place among the tiles of all sequences."""
    s = -1
    tile = 0
    tiles_before = 0
    for i in range(num_seqs):
        num_rows = tl.load(query_start_ptr + i + 1) - tl.load(query_start_ptr + i)
        num_tiles = tl.cdiv(num_rows, QUERIES)
        is_here = (place >= tiles_before) & (place < tiles_before + num_tiles)
        s = tl.where(is_here, i, s)
        tile = tl.where(is_here, num_tiles - 1 - (place - tiles_before), tile)  # the longest first
        tiles_before += num_tiles
    return s, tile


@triton.jit
def _count_shares(most_shares, query_start_ptr, num_seqs, QUERIES: tl.constexpr):
    """As many as give every tile the same number of the launch's programs."""
    num_tiles = 0
    for i in range(num_seqs):
        num_rows = tl.load(query_start_ptr + i + 1) - tl.load(query_start_ptr + i)
        num_tiles += tl.cdiv(num_rows, QUERIES)
    return tl.minimum(most_shares, tl.num_programs(1) // tl.maximum(num_tiles, 1))


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "most_shares"])
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,
    query_start_ptr,
    context_start_ptr,
    cached_kv_ptr,
    cached_rope_ptr,
    cached_start_ptr,
    out_ptr,
    parts_ptr,
    mass_ptr,
    q_stride_t,
    q_stride_h,
    kv_stride_l,
    kv_stride_h,
    rope_stride,
    cached_stride_l,
    cached_stride_h,
    cached_rope_stride,
    num_rows,
    num_heads,
    num_seqs,
    most_shares,
    HAS_CACHED: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    place = tl.program_id(1)
    share = 0
    num_shares = 1
    if IS_SHARED:
        num_shares = _count_shares(most_shares, query_start_ptr, num_seqs, QUERIES)
        share = place % num_shares
        place = place // num_shares
    s, tile = _find_tile(place, query_start_ptr, num_seqs, QUERIES)
    if s < 0:
        return
    first_query = tl.load(query_start_ptr + s)
    num_queries = tl.load(query_start_ptr + s + 1) - first_query
    queries = tile * QUERIES + tl.arange(0, QUERIES)
    is_query = (queries < num_queries)[:, None]
    rows = (first_query + queries).to(tl.int64)
    q_base = q_ptr + rows[:, None] * q_stride_t + head * q_stride_h
    q_nope = tl.load(q_base + tl.arange(0, NOPE)[None, :], mask=is_query, other=0.0)
    q_rope = tl.load(q_base + NOPE + tl.arange(0, ROPE)[None, :], mask=is_query, other=0.0)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, VALUE], tl.float32)
    if HAS_CACHED:
        first = tl.load(cached_start_ptr + s)
        num_cached = tl.load(cached_start_ptr + s + 1) - first
        share_size = tl.cdiv(tl.cdiv(num_cached, num_shares), KEYS) * KEYS
        begin = share * share_size
        end = tl.minimum(begin + share_size, num_cached)
        if IS_SHARED:
            if (share > 0) & (begin >= end):
                return
        whole_end = begin + (end - begin) // KEYS * KEYS
        kv_base = cached_kv_ptr + first.to(tl.int64) * cached_stride_l + head * cached_stride_h
        rope_base = cached_rope_ptr + first.to(tl.int64) * cached_rope_stride
        acc, total, largest = _attend_rows(
            acc, total, largest, q_nope, q_rope, kv_base, rope_base, cached_stride_l, cached_rope_stride,
            begin, whole_end, queries,
            False, NOPE, ROPE, VALUE, KEYS, PRECISION,
        )  # fmt: skip
        acc, total, largest = _attend_rows(
            acc, total, largest, q_nope, q_rope, kv_base, rope_base, cached_stride_l, cached_rope_stride,
            whole_end, end, queries * 0 + end - 1,
            True, NOPE, ROPE, VALUE, KEYS, PRECISION,
        )  # fmt: skip
    first_key = tl.load(context_start_ptr + s)
    num_keys = tl.load(context_start_ptr + s + 1) - first_key
    num_hidden = num_keys - num_queries
    last_visible = num_hidden + queries
    kv_base = kv_ptr + first_key.to(tl.int64) * kv_stride_l + head * kv_stride_h
    rope_base = rope_ptr + first_key.to(tl.int64) * rope_stride
    # Every query of the tile sees all keys up to the first query's own.
    num_common = (num_hidden + tile * QUERIES + 1) // KEYS * KEYS
    end = tl.minimum(num_keys, num_hidden + (tile + 1) * QUERIES)
    if IS_SHARED:
        num_common = tl.where(share == 0, num_common, 0)
        end = tl.where(share == 0, end, 0)
    acc, total, largest = _attend_rows(
        acc, total, largest, q_nope, q_rope, kv_base, rope_base, kv_stride_l, rope_stride,
        0, num_common, last_visible,
        False, NOPE, ROPE, VALUE, KEYS, PRECISION,
    )  # fmt: skip
    acc, total, largest = _attend_rows(
        acc, total, largest, q_nope, q_rope, kv_base, rope_base, kv_stride_l, rope_stride,
        num_common, end, last_visible,
        True, NOPE, ROPE, VALUE, KEYS, PRECISION,
    )  # fmt: skip
    values = acc / total[:, None]
    out = (rows[:, None] * num_heads + head) * VALUE + tl.arange(0, VALUE)[None, :]
    num_stored = num_queries
    if IS_SHARED:
        mass = mass_ptr + (share * num_rows + rows) * num_heads + head
        tl.store(mass, largest + tl.log2(total), mask=queries < num_queries)
        num_stored = tl.where(share == 0, num_queries, 0)
        part = (share - 1) * num_rows * num_heads * VALUE
        tl.store(parts_ptr + part + out, values, mask=(queries < num_queries - num_stored)[:, None])
    values = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out, values, mask=(queries < num_stored)[:, None])


@triton.jit
def _merge_kernel(
    out_ptr,
    parts_ptr,
    mass_ptr,
    num_rows,
    num_heads,
    num_shares,
    SHARES_TILE: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Into out, which has the first share."""
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    shares = tl.arange(0, SHARES_TILE)
    size = num_rows * num_heads
    is_other = (shares > 0) & (shares < num_shares)
    mass = tl.load(mass_ptr + shares * size + row, mask=shares < num_shares, other=-float("inf"))
    if tl.max(tl.where(is_other, mass, -float("inf")), 0) == -float("inf"):
        return
    weights = tl.exp2(mass - tl.max(mass, 0))
    dims = tl.arange(0, VALUE)
    out = out_ptr + row * VALUE + dims
    # What a share without rows would have written is not there.
    parts = parts_ptr + ((shares[:, None] - 1) * size + row) * VALUE + dims[None, :]
    values = tl.load(parts, mask=(is_other & (mass > -float("inf")))[:, None], other=0.0)
    first = tl.sum(tl.where(shares == 0, weights, 0.0), 0)
    merged = tl.load(out).to(tl.float32) * first + tl.sum(values * weights[:, None], 0)
    tl.store(out, (merged / tl.sum(weights, 0)).to(out_ptr.dtype.element_ty))
