"""Where a model's tensors come from."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError", "WeightSource"]


class WeightSource(Protocol):
    """Tensors by their hub name ("model.layers.0.self_attn.o_proj.weight"), in the dtype that the model computes in."""

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A fresh contiguous tensor that the caller owns, FP8 dequantised. Raises CheckpointError if missing or of another shape."""
        ...

    def has(self, name: str) -> bool: ...
