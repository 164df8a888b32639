# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""How kernels reach into an MLA cache in FP8, whose rows are bytes as mla_fp8_rows has them.

C latent rank, R rotated dims, L rows of the result, S chunks, B blocks of a table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.mla_fp8_rows import rope_of

_ROWS = 8  # of a program that gathers
_MAX_PROGRAMS = 1056  # over a context that may be empty: eight for each multiprocessor of an H100


def is_fp8(cache: torch.Tensor) -> bool:
    return cache.dtype == torch.uint8


def gather_rows(cache: torch.Tensor, slots_L: torch.Tensor, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """[L, C + R] of a cache [num_blocks, block_size, bytes]; slots are int64."""
    num_rows, rope = slots_L.shape[0], rope_of(cache.shape[-1], rank)
    out_LC = torch.empty(num_rows, rank + rope, dtype=dtype, device=cache.device)
    _gather_rows_kernel[(triton.cdiv(num_rows, _ROWS),)](
        cache, slots_L, out_LC, num_rows, RANK=rank, ROPE=rope, ROWS=_ROWS, num_warps=4
    )
    return out_LC


def gather_context(
    cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    start_S: torch.Tensor,
    rank: int,
    max_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[max_rows, C + R]: rows start[s] .. start[s + 1] are the first ones of sequence s in the cache, as
    expand_context has it. Rows from start[S] on are not written."""
    rope = rope_of(cache.shape[-1], rank)
    out_LC = torch.empty(max_rows, rank + rope, dtype=dtype, device=cache.device)
    _gather_context_kernel[(min(triton.cdiv(max_rows, _ROWS), _MAX_PROGRAMS),)](
        cache,
        block_tables_SB,
        start_S,
        out_LC,
        block_tables_SB.stride(0),
        start_S.shape[0] - 1,
        RANK=rank,
        ROPE=rope,
        BLOCK_SIZE=cache.shape[1],
        ROWS=_ROWS,
        num_warps=4,
    )
    return out_LC


@triton.jit
def latents_at(cache_ptr, slots, RANK: tl.constexpr, ROPE: tl.constexpr):
    """Where the latents of the rows in these slots (int64) begin."""
    ROW: tl.constexpr = RANK + 2 * ROPE + 16
    return cache_ptr.to(tl.pointer_type(tl.float8e4nv)) + slots * ROW


@triton.jit
def latent_pairs_at(cache_ptr, slots, RANK: tl.constexpr, ROPE: tl.constexpr):
    """The same, of two latents a number: see split_pairs."""
    ROW: tl.constexpr = RANK + 2 * ROPE + 16
    return cache_ptr.to(tl.pointer_type(tl.uint16)) + slots * (ROW // 2)


@triton.jit
def rotated_at(cache_ptr, slots, RANK: tl.constexpr, ROPE: tl.constexpr):
    ROW: tl.constexpr = RANK + 2 * ROPE + 16
    return cache_ptr.to(tl.pointer_type(tl.bfloat16)) + slots * (ROW // 2) + RANK // 2


@triton.jit
def scales_at(cache_ptr, slots, RANK: tl.constexpr, ROPE: tl.constexpr):
    ROW: tl.constexpr = RANK + 2 * ROPE + 16
    return cache_ptr.to(tl.pointer_type(tl.float32)) + slots * (ROW // 4) + (RANK + 2 * ROPE) // 4


@triton.jit
def store_fp8_row(cache_ptr, slot, latent, rotated, RANK: tl.constexpr, ROPE: tl.constexpr):
    """Of float32 latents and rotated dims. A slot below 0 has no place in the cache."""
    dims = tl.arange(0, RANK)
    rope_dims = tl.arange(0, ROPE)
    scale = tl.maximum(tl.max(tl.abs(latent), 0), 1e-12) / 448.0
    latents = latents_at(cache_ptr, slot, RANK, ROPE)
    tl.store(latents + dims, (latent / scale).to(tl.float8e4nv), mask=dims * 0 + slot >= 0)
    to = rotated_at(cache_ptr, slot, RANK, ROPE)
    tl.store(to + rope_dims, rotated.to(tl.bfloat16), mask=rope_dims * 0 + slot >= 0)
    tl.store(scales_at(cache_ptr, slot, RANK, ROPE), scale, mask=slot >= 0)


@triton.jit
def split_pairs(pairs, dtype: tl.constexpr):
    """Of e4m3 latents 2 i and 2 i + 1 in number i: the even ones and the odd ones.

    Numbers of 16 bits go from shared memory to the registers of tensor cores as bfloat16 does, bytes do not.
    There the bits of e4m3 move to where bfloat16 has them, with 120 too little in the exponent, and a
    multiplication makes up for it, for subnormal numbers too. The conversion that Triton has goes number by
    number through float16, on a unit that is slower than reading the cache.
    """
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, sign;
            shl.b32 even, $2, 4;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 even, even, 0x07f007f0, sign, 0xea;
            shr.u32 odd, $2, 4;
            and.b32 sign, $2, 0x80008000;
            lop3.b32 odd, odd, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 $0, even, $3, $4;
            fma.rn.bf16x2 $1, odd, $3, $4;
            }
            """,
            "=r,=r,r,r,r",
            [pairs, tl.full(pairs.shape, 0x7B80, tl.uint16), tl.full(pairs.shape, 0x8000, tl.uint16)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return even.to(dtype), odd.to(dtype)


@triton.jit
def _copy_rows(cache_ptr, slots, out_ptr, rows, is_row, RANK: tl.constexpr, ROPE: tl.constexpr):
    """Rows of a cache to a contiguous [L, C + R]."""
    latent_dims = tl.arange(0, RANK)
    rope_dims = tl.arange(0, ROPE)
    mask = is_row[:, None]
    latents = latents_at(cache_ptr, slots, RANK, ROPE)[:, None] + latent_dims[None, :]
    rotated = rotated_at(cache_ptr, slots, RANK, ROPE)[:, None] + rope_dims[None, :]
    scale = tl.load(scales_at(cache_ptr, slots, RANK, ROPE), mask=is_row, other=0.0)
    latent = tl.load(latents, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    out = out_ptr + rows.to(tl.int64)[:, None] * (RANK + ROPE)
    tl.store(out + latent_dims[None, :], latent.to(out_ptr.dtype.element_ty), mask=mask)
    rope = tl.load(rotated, mask=mask, other=0.0)
    tl.store(out + RANK + rope_dims[None, :], rope.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def context_slots(
    rows,
    is_row,
    tables_ptr,
    start_ptr,
    table_stride,
    num_seqs,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """int64 [ROWS]: where these rows of all contexts, one behind the other, lie in a paged cache."""
    seqs = tl.zeros([ROWS], tl.int32)
    for i in range(1, num_seqs):
        seqs += (rows >= tl.load(start_ptr + i)).to(tl.int32)
    places = rows - tl.load(start_ptr + seqs)
    table = tables_ptr + seqs.to(tl.int64) * table_stride
    blocks = tl.load(table + places // BLOCK_SIZE, mask=is_row, other=0).to(tl.int64)
    return blocks * BLOCK_SIZE + places % BLOCK_SIZE


@triton.jit
def _gather_rows_kernel(
    cache_ptr, slots_ptr, out_ptr, num_rows, RANK: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
    _copy_rows(cache_ptr, slots, out_ptr, rows, is_row, RANK, ROPE)


@triton.jit
def _gather_context_kernel(
    cache_ptr,
    tables_ptr,
    start_ptr,
    out_ptr,
    table_stride,
    num_seqs,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    num_rows = tl.load(start_ptr + num_seqs)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        slots = context_slots(rows, is_row, tables_ptr, start_ptr, table_stride, num_seqs, BLOCK_SIZE, ROWS)
        _copy_rows(cache_ptr, slots, out_ptr, rows, is_row, RANK, ROPE)
