import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.weights import model_fingerprint

FLOAT32 = ("safetensors", torch.float32)


def test_same_files_have_the_same_fingerprint_wherever_they_lie(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    first = model_fingerprint(tmp_path, *FLOAT32)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    assert model_fingerprint(copy, *FLOAT32) == first


def test_dtype_and_load_format_are_in_the_fingerprint(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    fingerprints = {
        model_fingerprint(tmp_path, load_format, dtype)
        for load_format in ("safetensors", "dummy")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(fingerprints) == 4


def test_other_weights_under_the_same_header_change_the_fingerprint(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    make_checkpoint()
    first = model_fingerprint(tmp_path, *FLOAT32)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert model_fingerprint(tmp_path, *FLOAT32) != first


def test_another_config_changes_the_fingerprint(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    first = model_fingerprint(tmp_path, *FLOAT32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert model_fingerprint(tmp_path, *FLOAT32) != first


def test_end_ids_do_not_change_the_fingerprint(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    first = model_fingerprint(tmp_path, *FLOAT32)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert model_fingerprint(tmp_path, *FLOAT32) == first


def test_dummy_fingerprint_needs_no_weights(make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint()
    (tmp_path / "model.safetensors").unlink()
    assert len(model_fingerprint(tmp_path, "dummy", torch.float32)) == 16
    with pytest.raises(CheckpointError):
        model_fingerprint(tmp_path, *FLOAT32)


def test_made_up_weights_of_another_spread_have_another_fingerprint(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    make_checkpoint()
    first = model_fingerprint(tmp_path, "dummy", torch.float32)
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"baton_dummy_spread": "tied"}))
    assert model_fingerprint(tmp_path, "dummy", torch.float32) != first
