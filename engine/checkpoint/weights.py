"""Where a model's tensors come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

import torch

from engine.checkpoint.dummy_weights import DummyWeights
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.fingerprint import model_fingerprint
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.safetensors_weights import SafetensorsWeights

__all__ = ["CheckpointError", "LoadFormat", "WeightSource", "model_fingerprint", "open_weights"]

LoadFormat = Literal["safetensors", "dummy"]


class WeightSource(Protocol):
    """Tensors by their hub name ("model.layers.0.self_attn.o_proj.weight").

    With tied embeddings "lm_head.weight" is the embedding.
    """

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A contiguous CPU tensor that the caller may change, FP8 dequantised; dtype None: the model's.

        Raises CheckpointError naming the tensor when it is missing or has another shape.
        """
        ...

    def has(self, name: str) -> bool: ...


def open_weights(
    model_dir: Path,
    load_format: LoadFormat,
    dtype: torch.dtype,
    config: ModelConfig,
    progress: Callable[[int, int], None] | None = None,
) -> AbstractContextManager[WeightSource]:
    """`progress(done_bytes, total_bytes)` is called after each tensor, and at exit with all done."""
    if load_format == "dummy":
        return DummyWeights(config, dtype)
    return SafetensorsWeights(Path(model_dir), config, dtype, progress)
