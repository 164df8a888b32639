# ruff: noqa: PLR0913, PLR0915 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Absorbed MLA attention of one query row a sequence over a paged cache of latents.

Each program takes one share of one sequence's context for a group of heads, so that few sequences still fill
the device; a second kernel merges the shares by their log-sum-exp (the split of T. Dao et al.,
"Flash-Decoding", 2023). The value of a cached row is its latent: a row is read once for scores and sum.

S sequences, H heads, C latent rank, R rotated dims, P shares of a context, B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_decode_fp8 import decode_fp8_kernel
from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.mla_fp8_cache import is_fp8

_PROGRAMS = 264  # wanted at least: two for each multiprocessor of an H100
_MAX_SHARES = 32


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    num_rows: int = 32  # of the cache a step of the loop
    num_warps: int = 4
    num_stages: int = 2
    max_heads: int = 16  # of one program
    max_shares: int | None = None


DEFAULT_TUNING = DecodeTuning()
_ONE_TUNING = DecodeTuning(num_warps=8, num_stages=1, max_shares=64)
_FEW_TUNING = DecodeTuning(max_shares=64)


@dataclass(frozen=True, slots=True)
class Shares:
    """Of contexts that are not merged yet."""

    parts_SHPC: torch.Tensor  # float32
    mass_SHP: torch.Tensor  # float32: the base-2 logarithm of each share's sum of weights


def few_tuning(num_seqs: int) -> DecodeTuning:
    """For mla_few_rows: best of a whole step on an H100."""
    return _ONE_TUNING if num_seqs == 1 else _FEW_TUNING


def num_shares(num_seqs: int, num_heads: int, tuning: DecodeTuning = DEFAULT_TUNING) -> int:
    """A function of the batch's shape alone: the same inside a captured graph as outside."""
    programs = num_seqs * -(-num_heads // _heads_of(num_heads, tuning))
    return max(1, min(tuning.max_shares or _MAX_SHARES, round(_PROGRAMS / programs)))


def mla_decode(
    q_SHC: torch.Tensor,
    cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_len_S: torch.Tensor,
    rank: int,
    *,
    first_token: int = 0,
    shares: int | None = None,
    tuning: DecodeTuning = DEFAULT_TUNING,
) -> torch.Tensor:
    """Latents [S, H, C] of queries [S, H, C + R] that carry the softmax scale.

    cache [num_blocks, block_size, C + R], or bytes of FP8 rows; block_tables and context_len int32; a context
    of 0 gives zeros. Tokens before first_token are not seen.
    """
    num_seqs, num_heads, _ = q_SHC.shape
    shares = shares or num_shares(num_seqs, num_heads, tuning)
    out_SHC = q_SHC.new_empty(num_seqs, num_heads, rank)
    if shares == 1:
        no_mass = q_SHC.new_empty(0, dtype=torch.float32)
        _launch(q_SHC, cache, block_tables_SB, context_len_S, (out_SHC, no_mass), 1, first_token, tuning)
        return out_SHC
    found = decode_shares(
        q_SHC, cache, block_tables_SB, context_len_S, rank, shares, first_token=first_token, tuning=tuning
    )
    rank_tile = min(rank, 256)
    _merge_kernel[(num_seqs, num_heads, rank // rank_tile)](
        found.parts_SHPC,
        found.mass_SHP,
        out_SHC,
        num_heads,
        shares,
        SHARES_TILE=triton.next_power_of_2(shares),
        RANK=rank,
        RANK_TILE=rank_tile,
        **launch_options(num_seqs),
    )
    return out_SHC


def decode_shares(
    q_SHC: torch.Tensor,
    cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_len_S: torch.Tensor,
    rank: int,
    shares: int,
    *,
    first_token: int = 0,
    tuning: DecodeTuning = DEFAULT_TUNING,
) -> Shares:
    """As mla_decode, before the shares are merged."""
    shape = (*q_SHC.shape[:2], shares)
    parts_SHPC = q_SHC.new_empty(*shape, rank, dtype=torch.float32)
    mass_SHP = q_SHC.new_empty(shape, dtype=torch.float32)
    out = (parts_SHPC, mass_SHP)
    _launch(q_SHC, cache, block_tables_SB, context_len_S, out, shares, first_token, tuning)
    return Shares(*out)


def _launch(
    q_SHC: torch.Tensor,
    cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_len_S: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    shares: int,
    first_token: int,
    tuning: DecodeTuning,
) -> None:
    num_seqs, num_heads, row_size = q_SHC.shape
    rank = out[0].shape[-1]
    heads = _heads_of(num_heads, tuning)
    kernel = decode_fp8_kernel if is_fp8(cache) else _decode_kernel
    kernel[(num_seqs, -(-num_heads // heads), shares)](
        q_SHC,
        cache,
        block_tables_SB,
        context_len_S,
        *out,
        q_SHC.stride(0),
        q_SHC.stride(1),
        block_tables_SB.stride(0),
        num_heads,
        shares,
        IS_SHARED=out[1].numel() > 0,
        RANK=rank,
        ROPE=row_size - rank,
        BLOCK_SIZE=cache.shape[1],
        HEADS=heads,
        FIRST=first_token,
        ROWS=tuning.num_rows,
        PRECISION="ieee" if q_SHC.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **launch_options(num_seqs),
    )


def _heads_of(num_heads: int, tuning: DecodeTuning) -> int:
    """16 at least: the smallest matrix of a tensor core."""
    return max(16, min(tuning.max_heads, triton.next_power_of_2(num_heads)))


@triton.jit
def _decode_kernel(
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
    rope_dims = tl.arange(0, ROPE)
    context = tl.load(context_ptr + s)
    rows_per_share = tl.cdiv(tl.cdiv(context, num_shares), ROWS) * ROWS
    begin = share * rows_per_share
    end = tl.minimum(begin + rows_per_share, context)

    q_base = q_ptr + s.to(tl.int64) * q_stride_s + heads[:, None] * q_stride_h
    q_latent = tl.load(q_base + latent_dims[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_base + RANK + rope_dims[None, :], mask=is_head[:, None], other=0.0)
    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, RANK], tl.float32)
    table = tables_ptr + s.to(tl.int64) * table_stride
    for start in range(begin, end, ROWS):
        places = start + tl.arange(0, ROWS)
        is_row = (places >= FIRST) & (places < end)
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_row, other=0).to(tl.int64)
        rows = cache_ptr + (blocks * BLOCK_SIZE + places % BLOCK_SIZE) * (RANK + ROPE)
        latent = tl.load(rows[:, None] + latent_dims[None, :], mask=is_row[:, None], other=0.0)
        rope = tl.load(rows[:, None] + RANK + rope_dims[None, :], mask=is_row[:, None], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(rope), acc=scores, input_precision=PRECISION)
        scores = tl.where(is_row[None, :], scores * 1.4426950408889634, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        probs = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(latent.dtype), latent, acc=acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    mass = tl.where(total > 0, total, 1.0)
    acc = acc / mass[:, None]
    place = (s.to(tl.int64) * num_heads + heads) * num_shares + share
    out = parts_ptr + place[:, None] * RANK + latent_dims[None, :]
    tl.store(out, acc.to(parts_ptr.dtype.element_ty), mask=is_head[:, None])
    if IS_SHARED:
        log_mass = tl.where(total > 0, largest + tl.log2(mass), -float("inf"))
        tl.store(mass_ptr + place, log_mass, mask=is_head)


@triton.jit
def _merge_kernel(
    parts_ptr,
    mass_ptr,
    out_ptr,
    num_heads,
    num_shares,
    SHARES_TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    place = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    dims = tl.program_id(2) * RANK_TILE + tl.arange(0, RANK_TILE)
    shares = tl.arange(0, SHARES_TILE)
    is_share = shares < num_shares
    mass = tl.load(mass_ptr + place * num_shares + shares, mask=is_share, other=-float("inf"))
    largest = tl.max(mass, 0)
    weights = tl.exp2(mass - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    parts = parts_ptr + (place * num_shares + shares[:, None]) * RANK + dims[None, :]
    values = tl.load(parts, mask=is_share[:, None], other=0.0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place * RANK + dims, merged.to(out_ptr.dtype.element_ty))
