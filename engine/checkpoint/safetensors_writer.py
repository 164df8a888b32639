"""Writing a checkpoint's tensors, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoint.safetensors_file import INDEX_NAME, SINGLE_NAME

MAX_SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    name: str
    num_bytes: int
    make: Callable[[], torch.Tensor]


def write_tensors(
    directory: Path,
    tensors: Sequence[TensorToWrite],
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """model.safetensors, or shards and an index. `progress(done_bytes, total_bytes)` after each tensor."""
    shards = _shards(tensors, max_shard_bytes)
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    done_bytes = 0
    weight_map = {}
    for i, shard in enumerate(shards):
        is_single = len(shards) == 1
        file = SINGLE_NAME if is_single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for tensor in shard:
            made[tensor.name] = tensor.make()
            weight_map[tensor.name] = file
            done_bytes += tensor.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        save_file(made, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # save_file leaves it readable by its owner only
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[TensorToWrite], max_shard_bytes: int) -> list[list[TensorToWrite]]:
    shards: list[list[TensorToWrite]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        if shards[-1] and num_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.num_bytes
    return shards
