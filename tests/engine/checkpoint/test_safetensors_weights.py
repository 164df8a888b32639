import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.safetensors_weights import SafetensorsWeights
from engine.checkpoint.weights import open_weights

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def open_float32(directory: Path) -> SafetensorsWeights:
    return SafetensorsWeights(directory, load_model_config(directory), torch.float32)


def opening_error(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_float32(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_of_one_file_comes_back(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint()
    with open_float32(tmp_path) as weights:
        assert all(torch.equal(weights.get(name, tuple(t.shape)), t) for name, t in tensors.items())
        assert all(weights.has(name) for name in tensors)
        assert not weights.has("model.layers.9.mlp.up_proj.weight")


def test_every_tensor_of_sharded_files_comes_back(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint(max_shard_bytes=4096)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    with open_float32(tmp_path) as weights:
        assert all(torch.equal(weights.get(name, tuple(t.shape)), t) for name, t in tensors.items())


def test_tensors_are_converted_to_the_wanted_dtype(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint()
    config = load_model_config(tmp_path)
    with open_weights(tmp_path, "safetensors", torch.bfloat16, config) as weights:
        assert torch.equal(weights.get(NORM, (16,)), tensors[NORM].to(torch.bfloat16))
        assert torch.equal(weights.get(NORM, (16,), torch.float32), tensors[NORM])


def test_writing_to_a_tensor_leaves_the_file_alone(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint()
    with open_float32(tmp_path) as weights:
        weights.get(NORM, (16,)).zero_()
    with open_float32(tmp_path) as weights:
        assert torch.equal(weights.get(NORM, (16,)), tensors[NORM])


def test_a_tensor_outlives_its_source(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint()
    with open_float32(tmp_path) as weights:
        embedding = weights.get("model.embed_tokens.weight", (64, 16))
    del weights
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"])


def test_tied_head_is_the_embedding(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    with open_float32(tmp_path) as weights:
        assert weights.has("lm_head.weight")
        assert torch.equal(weights.get("lm_head.weight", (64, 16)), tensors["model.embed_tokens.weight"])


def test_progress_counts_bytes_to_the_end(make_checkpoint: Any, tmp_path: Path) -> None:
    tensors = make_checkpoint()
    total = sum(tensor.nbytes for tensor in tensors.values())
    calls: list[tuple[int, int]] = []
    with open_weights(
        tmp_path, "safetensors", torch.float32, load_model_config(tmp_path), lambda *at: calls.append(at)
    ) as weights:
        weights.get(NORM, (16,))
        weights.get(NORM, (16,))
    assert calls == [(64, total), (64, total), (total, total)]


def test_missing_tensor_is_named_with_its_shape(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    with open_float32(tmp_path) as weights, pytest.raises(CheckpointError) as caught:
        weights.get("model.layers.7.mlp.up_proj.weight", (24, 16))
    assert "tensor model.layers.7.mlp.up_proj.weight is missing, expected with shape [24, 16]" in str(
        caught.value
    )


def test_wrong_shape_names_both_shapes(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    with open_float32(tmp_path) as weights, pytest.raises(CheckpointError) as caught:
        weights.get(NORM, (17,))
    assert f"tensor {NORM} has shape [16], expected [17]" in str(caught.value)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_truncated_file_is_known_on_opening(make_checkpoint: Any, tmp_path: Path, kept_bytes: int) -> None:
    make_checkpoint()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "truncated" in opening_error(tmp_path)


def test_file_with_a_foreign_header_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    (tmp_path / "model.safetensors").write_bytes((6).to_bytes(8, "little") + b"[1, 2]")
    assert "header is not that of a safetensors file" in opening_error(tmp_path)


def test_directory_without_weights_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    (tmp_path / "model.safetensors").unlink()
    assert f"neither model.safetensors nor {INDEX}" in opening_error(tmp_path)


def test_index_naming_a_missing_shard_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint(max_shard_bytes=4096)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    assert f"{shard.name} is not there (1 of" in opening_error(tmp_path)


def test_index_naming_a_tensor_that_the_shard_lacks_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint(max_shard_bytes=4096)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][NORM]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "the index places model.extra.weight here" in opening_error(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map must map tensor names to file names"),
        ('{"weight_map": {"a": 1}}', "weight_map must map tensor names to file names"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "must be a file name without a directory"),
    ],
)
def test_broken_index_is_refused(make_checkpoint: Any, tmp_path: Path, text: str, expected: str) -> None:
    make_checkpoint()
    (tmp_path / INDEX).write_text(text)
    message = opening_error(tmp_path)
    assert INDEX in message
    assert expected in message


def test_integer_weights_are_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    save_file({NORM: torch.ones(16, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with open_float32(tmp_path) as weights, pytest.raises(CheckpointError, match="unsupported dtype I8"):
        weights.get(NORM, (16,))
