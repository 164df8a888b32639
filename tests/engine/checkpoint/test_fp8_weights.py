import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.checkpoint import fp8
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.checkpoint.weights import open_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def dequantise_reference(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Value by value, as the definition reads."""
    rows = [
        [float(weight[r, c]) * float(scale[r // block[0], c // block[1]]) for c in range(weight.shape[1])]
        for r in range(weight.shape[0])
    ]
    return torch.tensor(rows)


@given(
    rows=st.integers(1, 20), columns=st.integers(1, 20), block=st.tuples(st.integers(1, 8), st.integers(1, 8))
)
@settings(max_examples=50, deadline=None)
def test_each_value_is_multiplied_by_the_scale_of_its_block(
    rows: int, columns: int, block: tuple[int, int]
) -> None:
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(fp8.num_blocks((rows, columns), block)) + 0.5
    out = fp8.dequantise(weight, scale, block, torch.float32)
    assert torch.equal(out, dequantise_reference(weight.float(), scale, block))


@given(rows=st.integers(1, 300), columns=st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_quantising_keeps_values_to_a_sixteenth(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    values, scale = fp8.quantise(weight, (128, 128))
    back = fp8.dequantise(values, scale, (128, 128), torch.float32)
    block_max = weight.abs().max()
    assert ((back - weight).abs() <= weight.abs() / 16 + block_max / 448).all()


def test_fp8_checkpoint_loads_as_its_dequantised_values(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path / "plain", "deepseek_v3")
    make_random_checkpoint(tmp_path / "fp8", "deepseek_v3", is_fp8=True)
    name, shape = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", (80, 256)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[name + "_scale_inv"].shape == (1, 2)
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    config = load_model_config(tmp_path / "fp8")
    with open_weights(tmp_path / "fp8", "safetensors", torch.bfloat16, config) as weights:
        loaded = weights.get(name, shape)
    assert loaded.dtype == torch.bfloat16
    expected = load_file(tmp_path / "plain" / "model.safetensors")[name]
    assert torch.nn.functional.cosine_similarity(loaded.float().flatten(), expected.flatten(), dim=0) > 0.999


def write_fp8_projection(directory: Path, **tensors: torch.Tensor) -> None:
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    weight = torch.ones(16, 16).to(torch.float8_e4m3fn)
    save_file(
        {Q_PROJ: weight} | {Q_PROJ + name: t for name, t in tensors.items()}, directory / "model.safetensors"
    )


def read_projection(directory: Path) -> torch.Tensor:
    with open_weights(directory, "safetensors", torch.float32, load_model_config(directory)) as weights:
        return weights.get(Q_PROJ, (16, 16))


def test_missing_scale_is_named(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    write_fp8_projection(tmp_path)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}_scale_inv is missing"):
        read_projection(tmp_path)


def test_scale_of_wrong_shape_is_named(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    write_fp8_projection(tmp_path, _scale_inv=torch.ones(2, 1))
    with pytest.raises(CheckpointError, match=r"_scale_inv has shape \[2, 1\], expected \[1, 1\]"):
        read_projection(tmp_path)


def test_float8_without_quantization_config_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    save_file({Q_PROJ: torch.ones(16, 16).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is float8 without a quantization_config"):
        read_projection(tmp_path)
