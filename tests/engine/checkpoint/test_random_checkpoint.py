import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint import random_checkpoint
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.hub_tensors import hub_tensors
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_checkpoint import main, make_random_checkpoint
from engine.checkpoint.weights import model_fingerprint

ARCHS = ("deepseek_v3", "deepseek_v2", "llama")


@pytest.fixture(scope="module", params=ARCHS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / request.param
    make_random_checkpoint(directory, request.param)
    return directory


def test_transformers_finds_every_tensor_and_no_other(checkpoint: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_transformers_saves_is_the_same_model_to_us(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config == load_model_config(checkpoint)
    saved, made = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == hub_tensors(config)
    assert all(torch.equal(saved[name], made[name]) for name in made)


def test_logits_have_clear_maxima(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.arange(100, 164)[None]).logits[0]
    assert 1.5 < float(logits.std()) < 3.0
    top = logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).median()) > 0.1


def test_tokenizer_fits_the_vocabulary_and_speaks_the_chat_template(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = load_model_config(checkpoint)
    assert len(tokenizer) <= config.vocab_size
    assert tokenizer.eos_token_id in config.eos_token_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text).input_ids
    assert max(ids) < config.vocab_size
    assert tokenizer.decode(ids) == text


def test_without_smollm2_the_tokenizer_is_one_token_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Path:
        raise CheckpointError("not installed")

    monkeypatch.setattr(random_checkpoint, "find_smollm2", absent)
    make_random_checkpoint(tmp_path / "m", "llama")
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    text = "na\u00efve \U0001f600 x = 12\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_small576_is_the_64_6_million_parameter_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(random_checkpoint.hub_config("deepseek_v3", "small576", "float32"))
    )
    shapes = hub_tensors(load_model_config(tmp_path)).values()
    assert round(sum(torch.Size(shape).numel() for shape in shapes) / 1e6, 1) == 64.6
    assert load_model_config(tmp_path).kv_token_shape == (576,)


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_random_checkpoint(tmp_path / name, "llama", seed=seed)
    a, b, c = (model_fingerprint(tmp_path / name, "safetensors", torch.float32) for name in "abc")
    assert a == b != c


def test_bfloat16_keeps_the_correction_bias_in_float32(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path / "m", "deepseek_v3", dtype="bfloat16")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
        assert file.get_tensor("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16


def test_command_refuses_a_directory_with_foreign_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine").touch()
    assert main([str(tmp_path), "--arch", "llama"]) == 2
    assert "was not made by this command" in caplog.text
