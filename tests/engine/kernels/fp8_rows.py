"""Rows of an MLA cache in FP8, for the tests of kernels and engine."""

from __future__ import annotations

import torch

from engine.kernels.mla_fp8_rows import SCALE_BYTES, dequantise_mla_rows, quantise_mla_rows


def quantised_as_here(rows_TC: torch.Tensor, rank: int) -> torch.Tensor:
    """As the kernels quantise. Without a GPU they do it in Triton's interpreter: where e4m3 is rounded up to
    an even power of two it loses the carry and stores half of that, and bfloat16 it cuts."""
    rows = quantise_mla_rows(rows_TC, rank)
    if torch.cuda.is_available():
        return rows
    scales = rows[:, -SCALE_BYTES:][:, :4].contiguous().view(torch.float32)
    latents = rows_TC[:, :rank].float() / scales
    codes = rows[:, :rank].contiguous().view(torch.float8_e4m3fn)
    is_carried = (rows[:, :rank] & 15 == 0) & (codes.float().abs() > latents.abs()) & (codes.float() != 0)
    codes = torch.where(is_carried, codes.float() / 2, codes.float()).to(torch.float8_e4m3fn)
    rotated = (rows_TC[:, rank:].float().contiguous().view(torch.int32) & -0x10000).view(torch.float32)
    parts = (codes, rotated.bfloat16(), rows[:, -SCALE_BYTES:])
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def fp8_cache(cache: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache [num_blocks, block_size, C + R] in FP8, and what that holds, in float32."""
    stored = quantise_mla_rows(cache.flatten(0, 1), rank).unflatten(0, cache.shape[:2])
    return stored, dequantise_mla_rows(stored, rank)
