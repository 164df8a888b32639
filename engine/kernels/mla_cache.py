# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Where a row's parts lie in an MLA cache, for the kernels that read and write it: in the model's dtype C
latents and R rotated dims, in FP8 the bytes of mla_fp8_rows. ROW is a row's size in elements of the cache.

Who reads FP8 multiplies latents as they are stored, and scales what comes of a row, not each latent.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.mla_fp8_rows import rope_of

_GATHERED = 8  # rows of a program


def row_options(cache: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch, for its constexprs ROW and IS_FP8."""
    return {"ROW": cache.shape[-1], "IS_FP8": cache.dtype == torch.uint8}


def rope_size(cache: torch.Tensor, rank: int) -> int:
    """R."""
    size = cache.shape[-1]
    return rope_of(size, rank) if cache.dtype == torch.uint8 else size - rank


def gather_rows(cache: torch.Tensor, slots_L: torch.Tensor, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """[L, C + R] of a cache [num_blocks, block_size, ROW]; in FP8 it comes in `dtype`."""
    if cache.dtype != torch.uint8:
        return cache.flatten(0, 1).index_select(0, slots_L)
    num_rows, rope = slots_L.shape[0], rope_size(cache, rank)
    out_LC = torch.empty(num_rows, rank + rope, dtype=dtype, device=cache.device)
    _gather_kernel[(triton.cdiv(num_rows, _GATHERED),)](
        cache, slots_L, out_LC, num_rows, RANK=rank, ROPE=rope, ROWS=_GATHERED, **row_options(cache)
    )
    return out_LC


@triton.jit
def latents_at(cache_ptr, slots, ROW: tl.constexpr, IS_FP8: tl.constexpr):
    """Of the rows in these slots (int64), where their latents begin."""
    if IS_FP8:
        return cache_ptr.to(tl.pointer_type(tl.float8e4nv)) + slots * ROW
    else:
        return cache_ptr + slots * ROW


@triton.jit
def rotated_at(cache_ptr, slots, RANK: tl.constexpr, ROW: tl.constexpr, IS_FP8: tl.constexpr):
    if IS_FP8:
        return cache_ptr.to(tl.pointer_type(tl.bfloat16)) + slots * (ROW // 2) + RANK // 2
    else:
        return cache_ptr + slots * ROW + RANK


@triton.jit
def scales_at(cache_ptr, slots, RANK: tl.constexpr, ROPE: tl.constexpr, ROW: tl.constexpr):
    """In FP8 only."""
    return cache_ptr.to(tl.pointer_type(tl.float32)) + slots * (ROW // 4) + (RANK + 2 * ROPE) // 4


@triton.jit
def _gather_kernel(
    cache_ptr,
    slots_ptr,
    out_ptr,
    num_rows,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
    latent_dims = tl.arange(0, RANK)
    rope_dims = tl.arange(0, ROPE)
    latent = tl.load(latents_at(cache_ptr, slots, ROW, IS_FP8)[:, None] + latent_dims[None, :])
    scale = tl.load(scales_at(cache_ptr, slots, RANK, ROPE, ROW))
    rotated = tl.load(rotated_at(cache_ptr, slots, RANK, ROW, IS_FP8)[:, None] + rope_dims[None, :])
    latent = latent.to(tl.float32) * scale[:, None]
    out = out_ptr + rows.to(tl.int64)[:, None] * (RANK + ROPE)
    tl.store(out + latent_dims[None, :], latent.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(out + RANK + rope_dims[None, :], rotated.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
