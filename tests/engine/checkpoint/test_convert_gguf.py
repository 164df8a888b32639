import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_samples import HEAD_DIM, HEADS, HIDDEN, SENTENCEPIECES, write_llama
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from engine.checkpoint.convert_gguf import convert, main
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import load_model_config


def convert_sample(tmp_path: Path, **kwargs: object) -> Path:
    source = write_llama(tmp_path / "sample.gguf", **kwargs)
    convert(source, tmp_path / "model", torch.float32)
    return tmp_path / "model"


def test_converted_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    directory = convert_sample(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="sample.gguf", dtype=torch.float32)
    ours, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    ids = torch.arange(300, dtype=torch.int64)[None] % len(SENTENCEPIECES)
    with torch.no_grad():
        assert torch.equal(ours(ids[:, :64]).logits, model(ids[:, :64]).logits)


def test_config_is_that_of_the_metadata(tmp_path: Path) -> None:
    config = load_model_config(convert_sample(tmp_path))
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (
        HIDDEN,
        HEADS,
        2,
        HEAD_DIM,
    )
    assert (config.rope.theta, config.rope.scaling, config.max_position_embeddings) == (500000.0, "none", 128)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == {2}


def test_end_of_turn_is_an_end_id(tmp_path: Path) -> None:
    config = load_model_config(convert_sample(tmp_path, tokenizer__ggml__eot_token_id=7))
    assert config.eos_token_ids == {2, 7}


def test_sentencepiece_text_is_tokenised_by_score(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(convert_sample(tmp_path) / "tokenizer.json"))
    assert tokenizer.encode("hello world").tokens == ["<s>", "\u2581hello", "\u2581world"]
    assert tokenizer.encode("held").tokens == ["<s>", "\u2581he", "ld"]
    assert tokenizer.encode("<tool></s>", add_special_tokens=False).ids == [len(SENTENCEPIECES) - 1, 2]


@pytest.mark.parametrize("text", ["hello world", "held", "\u00e9 \U0001f600", "hello  world ", ""])
def test_sentencepiece_text_comes_back(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(convert_sample(tmp_path) / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_rope_factors_of_llama_3_1_become_its_scaling(tmp_path: Path) -> None:
    frequencies = 500000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    factors = np.where(
        wavelengths < 8192 / 4, 1.0, np.where(wavelengths > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth))
    )
    directory = convert_sample(tmp_path, extra={"rope_freqs.weight": factors.astype(np.float32)})
    rope = load_model_config(directory).rope
    assert (rope.scaling, rope.factor, rope.original_max_position_embeddings) == ("llama3", 8.0, 8192)


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rope_freqs.weight is not the rope scaling of Llama 3.1"):
        convert_sample(tmp_path, extra={"rope_freqs.weight": np.array([1, 3, 2, 8], dtype=np.float32)})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"arch": "qwen2"}, "architecture must be llama, found 'qwen2'"),
        ({"llama__expert_count": 8}, "llama with experts"),
        (
            {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2},
            "rope scaling 'longrope'",
        ),
    ],
)
def test_models_that_are_no_plain_llama_are_refused(tmp_path: Path, metadata: dict, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        convert_sample(tmp_path, **metadata)


def test_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor blk.0.attn_q.bias is not one of a llama model"):
        convert_sample(tmp_path, extra={"blk.0.attn_q.bias": np.ones(HIDDEN, dtype=np.float32)})
    assert not (tmp_path / "model").exists()


def test_second_conversion_finds_it_done(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "sample.gguf")
    assert convert(source, tmp_path / "model", torch.float32)
    assert not convert(source, tmp_path / "model", torch.float32)
    assert convert(source, tmp_path / "model", torch.bfloat16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_command_converts_and_reports_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = write_llama(tmp_path / "sample.gguf")
    assert main([str(source), str(tmp_path / "model"), "--dtype", "bfloat16"]) == 0
    assert "weights 100 %" in caplog.text
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044


def test_command_gives_one_line_for_a_missing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path / "absent.gguf"), str(tmp_path / "model")]) == 2
    assert [record.message for record in caplog.records] == [
        f"error: {tmp_path}/absent.gguf: No such file or directory"
    ]


def test_command_wants_one_source(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "model")])
    assert caught.value.code == 2


def test_another_file_of_the_same_name_is_converted_again(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "sample.gguf")
    convert(source, tmp_path / "model", torch.float32)
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    assert convert(source, tmp_path / "model", torch.float32)
