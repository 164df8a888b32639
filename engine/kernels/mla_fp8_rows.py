"""Rows of an MLA cache in FP8, as bytes: C latents in e4m3, R rotated dims in bfloat16, a float32 scale of
the latents, and padding. Every row and every part of it begins at a multiple of 16 bytes.

e4m3 is a floating-point format, so one scale a row is enough: it takes the row's largest latent to the
format's largest number. The rotated dims would lose most, and are few.
"""

from __future__ import annotations

import torch

from engine.checkpoint.fp8 import E4M3_MAX

SCALE_BYTES = 16  # with the padding


def row_bytes(rank: int, rope: int) -> int:
    """C and R are multiples of 16."""
    return rank + 2 * rope + SCALE_BYTES


def rope_of(num_bytes: int, rank: int) -> int:
    """R of a row of so many bytes."""
    return (num_bytes - rank - SCALE_BYTES) // 2


def quantise_mla_rows(rows_TC: torch.Tensor, rank: int) -> torch.Tensor:
    """uint8 [T, row_bytes] of rows [T, C + R]."""
    latents, rotated = rows_TC.float().split((rank, rows_TC.shape[1] - rank), dim=1)
    scales = latents.abs().amax(1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    padding = torch.zeros(len(rows_TC), SCALE_BYTES - 4, dtype=torch.uint8, device=rows_TC.device)
    parts = ((latents / scales).to(torch.float8_e4m3fn), rotated.bfloat16(), scales, padding)
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def dequantise_mla_rows(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """float32 [..., C + R] of uint8 [..., row_bytes]."""
    sizes = (rank, 2 * rope_of(rows.shape[-1], rank), 4, SCALE_BYTES - 4)
    latents, rotated, scales, _ = (part.contiguous() for part in rows.split(sizes, dim=-1))
    latents = latents.view(torch.float8_e4m3fn).float() * scales.view(torch.float32)
    return torch.cat((latents, rotated.view(torch.bfloat16).float()), dim=-1)
