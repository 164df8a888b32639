"""Rotary position embedding as one complex product.

Queries and keys are kept with interleaved pairs (0, 1), (2, 3), ... whatever the checkpoint's order is:
`interleave_rows` reorders weights at load. A score does not change when query and key are reordered alike.
"""

from __future__ import annotations

import math

import torch

from engine.checkpoint.model_config import RopeConfig


class Rotary:
    def __init__(self, config: RopeConfig, rotary_dim: int, device: torch.device | str) -> None:
        self._inverse_freq_R = inverse_frequencies(config, rotary_dim).to(device)
        self._magnitude = attention_factor(config)

    def rotations(self, positions_T: torch.Tensor) -> torch.Tensor:
        """complex64 [T, R / 2] for `rotate_`."""
        angles_TR = torch.outer(positions_T.to(torch.float32), self._inverse_freq_R)
        return torch.polar(torch.full_like(angles_TR, self._magnitude), angles_TR)


def rotate_(x: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotate interleaved pairs of x [..., R] in place by complex rotations, broadcast to [..., R / 2]."""
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == torch.float32 and _has_even_layout(pairs):
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        rotated = torch.view_as_complex(pairs.float().contiguous()).mul_(rotations)
        x.copy_(torch.view_as_real(rotated).flatten(-2))


def _has_even_layout(pairs: torch.Tensor) -> bool:
    strides = pairs.stride()
    return (
        strides[-1] == 1
        and pairs.storage_offset() % 2 == 0
        and not any(stride % 2 for stride in strides[:-1])
    )


def interleave_rows(weight: torch.Tensor) -> torch.Tensor:
    """[R, ...] from half order (pairs (0, R / 2), (1, R / 2 + 1), ...) to interleaved pairs."""
    half = weight.shape[0] // 2
    return torch.stack((weight[:half], weight[half:]), dim=1).flatten(0, 1)


def inverse_frequencies(config: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """float32 [R / 2]. "dynamic" scales only beyond the model's longest context: never here."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    inverse_freq = 1.0 / config.theta**exponents
    if config.scaling == "linear":
        return inverse_freq / config.factor
    if config.scaling == "llama3":
        return _llama3_frequencies(config, inverse_freq)
    if config.scaling == "yarn":
        return _yarn_frequencies(config, inverse_freq)
    return inverse_freq


def _llama3_frequencies(config: RopeConfig, inverse_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by factor, short ones kept, the band between is blended."""
    original = config.original_max_position_embeddings
    turns = original * inverse_freq / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse_freq * (kept + (1 - kept) / config.factor)


def _yarn_frequencies(config: RopeConfig, inverse_freq: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv 2309.00071) section 3.2: a ramp over dimensions between kept and stretched frequencies."""
    rotary_dim = 2 * inverse_freq.shape[0]

    def dim_of(num_rotations: float) -> float:
        turns = config.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast), dim_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse_freq * (1 - stretched) + inverse_freq / config.factor * stretched


def attention_factor(config: RopeConfig) -> float:
    """Magnitude of the rotations."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
