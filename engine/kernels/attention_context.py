# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Keys and values of what a paged cache of latents holds of prompt chunks' sequences, for attention_prefill.

How many rows that are is read on the device: the launch depends on shapes alone, and so does the memory for
the result. A chunk of n tokens multiplies less this way than on the latents as soon as n (2 C + R) exceeds
C (N + V) + n (N + R + V): from 171 tokens on in DeepSeek's shape.

L rows of the result, S chunks, B blocks of a table, H heads, N, R and V dims of a head's key without
position, of the shared rotated key, and of a value; C latent rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_prefill import CachedRows
from engine.kernels.mla_fp8_cache import context_slots, gather_context, is_fp8


@dataclass(frozen=True, slots=True)
class ExpandTuning:
    num_rows: int = 128
    num_columns: int = 128
    depth: int = 64  # of the latent at a time
    num_warps: int = 8
    num_stages: int = 3
    num_programs: int = 264  # two for each multiprocessor of an H100


BF16_TUNING = ExpandTuning()
FP32_TUNING = ExpandTuning(num_rows=32, num_columns=32, depth=32, num_warps=4, num_stages=1)


def expand_context(
    cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    start_S: torch.Tensor,
    expansion_KC: torch.Tensor,
    num_heads: int,
    max_rows: int,
    tuning: ExpandTuning | None = None,
) -> CachedRows:
    """Rows start[s] .. start[s + 1] are the first ones of sequence s in the cache.

    cache [num_blocks, block_size, C + R], or bytes of FP8 rows; block tables int32; start int32 [S + 1], from
    0, the last one at most max_rows; expansion [H * (N + V), C]. Rows of the result from start[S] on are not
    written.
    """
    num_columns, rank = expansion_KC.shape
    is_gathered = is_fp8(cache)
    if is_gathered:
        rows_LC = gather_context(cache, block_tables_SB, start_S, rank, max_rows, expansion_KC.dtype)
        cache = rows_LC.unsqueeze(1)
    if tuning is None:
        tuning = FP32_TUNING if cache.dtype == torch.float32 else BF16_TUNING
    rope = cache.shape[2] - rank
    key_value_LK = cache.new_empty(max_rows, num_columns)
    rope_LR = cache.new_empty(max_rows, rope)
    most_tiles = -(-max_rows // tuning.num_rows) * -(-num_columns // tuning.num_columns)
    _expand_kernel[(min(most_tiles, tuning.num_programs),)](
        cache,
        block_tables_SB,
        start_S,
        expansion_KC,
        key_value_LK,
        rope_LR,
        block_tables_SB.stride(0),
        start_S.shape[0] - 1,
        num_columns,
        RANK=rank,
        ROPE=rope,
        BLOCK_SIZE=cache.shape[1],
        IS_GATHERED=is_gathered,
        ROWS=tuning.num_rows,
        COLUMNS=tuning.num_columns,
        DEPTH=min(rank, tuning.depth),
        PRECISION="ieee" if cache.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return CachedRows(key_value_LK.unflatten(-1, (num_heads, -1)), rope_LR, start_S)


@triton.jit(do_not_specialize=["num_seqs"])
def _expand_kernel(
    cache_ptr,
    tables_ptr,
    start_ptr,
    expansion_ptr,
    key_value_ptr,
    rope_ptr,
    table_stride,
    num_seqs,
    num_columns,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_rows = tl.load(start_ptr + num_seqs)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    depth_dims = tl.arange(0, DEPTH)
    rope_dims = tl.arange(0, ROPE)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * column_tiles, tl.num_programs(0)):
        rows = tile // column_tiles * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        columns = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
        if IS_GATHERED:
            slots = tl.minimum(rows, num_rows - 1).to(tl.int64)
        else:
            slots = context_slots(
                rows, is_row, tables_ptr, start_ptr, table_stride, num_seqs, BLOCK_SIZE, ROWS
            )
        cached = cache_ptr + slots * (RANK + ROPE)
        weights = expansion_ptr + (columns % num_columns).to(tl.int64) * RANK
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, RANK, DEPTH):
            latent = tl.load(cached[:, None] + begin + depth_dims[None, :])
            weight = tl.load(weights[:, None] + begin + depth_dims[None, :])
            acc = tl.dot(latent, tl.trans(weight), acc=acc, input_precision=PRECISION)
        out = key_value_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        is_out = is_row[:, None] & (columns < num_columns)[None, :]
        tl.store(out, acc.to(key_value_ptr.dtype.element_ty), mask=is_out)
        if tile % column_tiles == 0:
            rope = tl.load(cached[:, None] + RANK + rope_dims[None, :])
            rope_out = rope_ptr + rows.to(tl.int64)[:, None] * ROPE + rope_dims[None, :]
            tl.store(rope_out, rope, mask=is_row[:, None])
