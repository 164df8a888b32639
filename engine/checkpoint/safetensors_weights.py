"""Tensors of a Hugging Face directory, read one by one as the model asks for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoint import fp8
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.safetensors_file import StoredTensor, checkpoint_files, read_header

_SCALE_SUFFIX = "_scale_inv"


class SafetensorsWeights:
    """Owns the mapped files until exit. Construction checks all headers: a broken file is known at once.

    A tensor stored in the wanted dtype is not copied: it is a private (copy on write) mapping of the file,
    valid also after exit.
    """

    def __init__(
        self,
        model_dir: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model_dir = model_dir
        self._config = config
        self._dtype = dtype
        self._progress = progress
        self._places: dict[str, tuple[Path, StoredTensor]] = {}
        for path, names in checkpoint_files(model_dir).items():
            stored = read_header(path).tensors
            for name in stored if names is None else names:
                if name not in stored:
                    raise CheckpointError(f"{path}: the index places {name} here, but it is not in the file")
                self._places[name] = (path, stored[name])
        self._pending = {name: stored.num_bytes for name, (_, stored) in self._places.items()}
        self._total_bytes = sum(self._pending.values())
        self._done_bytes = 0
        self._files = ExitStack()
        self._open: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        return self._alias(name) in self._places

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        name = self._alias(name)
        stored = self._stored(name, tuple(shape))
        tensor = self._read(name)
        if stored.dtype == "F8_E4M3":
            tensor = self._dequantised(name, tensor, dtype or self._dtype)
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{self._model_dir}: tensor {name} has the unsupported dtype {stored.dtype}"
            )
        return tensor.to(dtype or self._dtype).contiguous()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._files.close()
        if kind is None and self._progress is not None:
            self._progress(self._total_bytes, self._total_bytes)

    def _alias(self, name: str) -> str:
        is_tied = name == "lm_head.weight" and self._config.tie_word_embeddings
        return "model.embed_tokens.weight" if is_tied else name

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(
                f"{self._model_dir}: tensor {name} is missing, expected with shape {list(shape)}"
            )
        path, stored = place
        if stored.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(stored.shape)}, expected {list(shape)}"
            )
        return stored

    def _read(self, name: str) -> torch.Tensor:
        path, _ = self._places[name]
        try:
            if path not in self._open:
                self._open[path] = self._files.enter_context(safe_open(path, framework="pt"))
            tensor: torch.Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from error
        self._done_bytes += self._pending.pop(name, 0)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def _dequantised(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        block_shape = self._config.fp8_block_shape
        if block_shape is None or weight.dim() != 2:
            raise CheckpointError(
                f"{self._model_dir}: tensor {name} is float8 without a quantization_config in config.json"
            )
        scale_name = name + _SCALE_SUFFIX
        self._stored(scale_name, fp8.num_blocks((weight.shape[0], weight.shape[1]), block_shape))
        return fp8.dequantise(weight, self._read(scale_name), block_shape, dtype)
