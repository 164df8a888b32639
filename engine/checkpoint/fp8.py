"""Block-scaled FP8 as DeepSeek publishes it: weight = float8_e4m3fn value * weight_scale_inv of its block."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
FP8_GROUP = 128  # columns of a row, and both sides of a weight's block, that share a scale


def num_blocks(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Blocks per dimension; the last ones may be partial."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def dequantise(
    weight_RC: torch.Tensor, scale_inv: torch.Tensor, block_shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[R, C] in `dtype`, multiplied in float32. `scale_inv` is float32 [R blocks, C blocks].

    One row of blocks at a time, so that no float32 copy of the whole weight exists.
    """
    num_rows, num_columns = weight_RC.shape
    scales = scale_inv.float().repeat_interleave(block_shape[1], dim=1)[:, :num_columns]
    out_RC = torch.empty((num_rows, num_columns), dtype=dtype, device=weight_RC.device)
    for i, first in enumerate(range(0, num_rows, block_shape[0])):
        rows = slice(first, first + block_shape[0])
        out_RC[rows] = weight_RC[rows].float() * scales[i]
    return out_RC


def quantise(weight_RC: torch.Tensor, block_shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [R, C], float32 scale_inv [R blocks, C blocks]); a block's largest value becomes 448."""
    num_rows, num_columns = weight_RC.shape
    blocks_RC = num_blocks((num_rows, num_columns), block_shape)
    padded_shape = (blocks_RC[0] * block_shape[0], blocks_RC[1] * block_shape[1])
    padded = torch.zeros(padded_shape, dtype=torch.float32, device=weight_RC.device)
    padded[:num_rows, :num_columns] = weight_RC
    blocks = padded.view(blocks_RC[0], block_shape[0], blocks_RC[1], block_shape[1])
    scale_inv = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / E4M3_MAX
    blocks /= scale_inv[:, None, :, None]
    return padded[:num_rows, :num_columns].to(torch.float8_e4m3fn).contiguous(), scale_inv
