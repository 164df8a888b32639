from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mtp_driver import NUM_LAYERS, build, random_prompts
from safetensors.torch import load_file, save_file

from engine.build import build_engine
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine
from engine.engine_config import EngineConfig, EngineConfigError
from engine.outputs import TokenLogprobs
from engine.sequence import Sequence
from engine.speculation.handed_draft import HandedDraft
from tests.engine.core.engine_driver import generate, greedy


def engine_of(model_dir: Path, num_speculative_tokens: int | None = None) -> Engine:
    return build_engine(
        EngineConfig(
            model_dir=model_dir,
            dtype="float32",
            num_blocks=8,
            max_model_len=64,
            num_speculative_tokens=num_speculative_tokens,
        )
    )


def test_a_checkpoint_with_the_layer_is_drafted_with_by_default(disagreeing: Path) -> None:
    engine = engine_of(disagreeing)
    assert engine.kv_layout.num_layers == NUM_LAYERS + 1
    assert engine._scheduler.config.num_speculative_tokens == 1


def test_blocks_with_and_without_the_layer_have_different_hashes(disagreeing: Path) -> None:
    with_layer, more, without = (engine_of(disagreeing, num_drafts) for num_drafts in (1, 3, 0))
    assert without.kv_layout.num_layers == NUM_LAYERS
    assert with_layer.kv_layout == more.kv_layout
    assert with_layer.kv_layout.difference(without.kv_layout) is not None
    prompt_ids = list(range(16))
    assert with_layer.hash_chain.hashes(prompt_ids) != without.hash_chain.hashes(prompt_ids)


@pytest.mark.parametrize("arch", ["deepseek_v3", "deepseek_v2", "llama"])
def test_a_checkpoint_without_the_layer_is_served_without_drafts(arch: str, tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path / "model", arch)
    engine = engine_of(tmp_path / "model")
    assert engine.kv_layout.num_layers == NUM_LAYERS
    with pytest.raises(EngineConfigError, match="has no layer of multi-token prediction"):
        engine_of(tmp_path / "model", 1)


def test_a_checkpoint_that_only_promises_the_layer(disagreeing: Path, tmp_path: Path) -> None:
    tensors = load_file(disagreeing / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(f"model.layers.{NUM_LAYERS}.")}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((disagreeing / "config.json").read_bytes())
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    prompts = random_prompts((5,))
    assert generate(engine_of(tmp_path), prompts, 8) == generate(engine_of(disagreeing, 0), prompts, 8)


@pytest.mark.parametrize("asked", [-1, 9])
def test_a_senseless_number_of_drafts(disagreeing: Path, asked: int) -> None:
    with pytest.raises(EngineConfigError, match="between 0 and 8"):
        engine_of(disagreeing, asked)


@pytest.mark.parametrize("arch", ["deepseek_v2", "llama"])
def test_there_is_no_such_preset_of_other_architectures(arch: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no layers of multi-token prediction"):
        make_random_checkpoint(tmp_path / "model", arch, "tiny_mtp")


@pytest.mark.parametrize(
    ("handed", "said"),
    [
        (HandedDraft((5,), b"\0" * 100), "has 100 bytes, expected 1024"),
        (HandedDraft((4096,), b"\0" * 1024), "draft 4096 is not in the vocabulary of 4096"),
    ],
)
def test_a_draft_state_that_does_not_fit_leaves_the_hand_off_as_it_was(
    disagreeing: Path, handed: HandedDraft, said: str
) -> None:
    engine = build(disagreeing, 1)
    engine.reserve(Sequence(1, [5, 6, 7], greedy(4)))
    engine.extend(1, lambda block_ids: None)
    with pytest.raises(ValueError, match=said):
        engine.commit(1, TokenLogprobs(9, 0.0), handed)
    engine.check_integrity()
    engine.abort(1)
    assert engine.load().num_used_blocks == 0


def test_more_drafts_than_the_receiver_makes_are_cut(disagreeing: Path) -> None:
    engine = build(disagreeing, 1)
    hidden = torch.zeros(256).numpy().tobytes()
    state = engine._runner.unpack_draft(HandedDraft((5, 6, 7), hidden), num_tokens=4)
    assert state.token_ids == [5]
    state = engine._runner.unpack_draft(HandedDraft((5, 6), hidden), num_tokens=engine.max_model_len - 1)
    assert state.token_ids == []
