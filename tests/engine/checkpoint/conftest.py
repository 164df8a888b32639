from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint.convert_gguf import convert, find_smollm2
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.hub_tensors import hub_tensors
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.safetensors_writer import TensorToWrite, write_tensors

MakeCheckpoint = Callable[..., dict[str, torch.Tensor]]

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 2}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Writes a llama of a few kilobytes into tmp_path and returns its tensors."""

    def make(max_shard_bytes: int = 1 << 30, **changes: object) -> dict[str, torch.Tensor]:
        config = hub_config("llama", "tiny", "float32") | SMALL | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(1)
        shapes = hub_tensors(load_model_config(tmp_path))
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        plan = [TensorToWrite(name, tensor.nbytes, tensor.clone) for name, tensor in tensors.items()]
        write_tensors(tmp_path, plan, max_shard_bytes=max_shard_bytes)
        return tensors

    return make


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    try:
        return find_smollm2()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted once a session, in float32 (about 10 s, 540 MB)."""
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    convert(smollm2_gguf, directory, torch.float32)
    return directory
