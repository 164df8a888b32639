import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_presets import hub_config

# deepseek-ai/DeepSeek-V3's config.json, without the fields that no loader needs.
DEEPSEEK_V3_HUB: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def write_config(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def error_of(directory: Path, config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model_config(write_config(directory, config))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_hub_config_of_deepseek_v3_is_read(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path, DEEPSEEK_V3_HUB))
    assert (config.num_layers, config.head_dim, config.num_kv_heads, config.num_mtp_layers) == (
        61,
        192,
        128,
        1,
    )
    assert config.kv_token_shape == (576,)
    assert config.fp8_block_shape == (128, 128)
    assert (config.rope.scaling, config.rope.factor, config.rope.mscale_all_dim) == ("yarn", 40.0, 1.0)
    assert config.rope.original_max_position_embeddings == 4096
    assert config.rope.interleave
    assert config.moe is not None
    assert (config.moe.num_groups, config.moe.topk_groups, config.moe.scoring) == (8, 4, "sigmoid")
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60)] == [False, False, True, True]


def test_both_spellings_of_a_model_give_one_config(tmp_path: Path) -> None:
    hub = load_model_config(write_config(tmp_path, DEEPSEEK_V3_HUB))
    saved = dict(DEEPSEEK_V3_HUB)
    for name in ("topk_method", "scoring_func", "moe_layer_freq", "rope_theta", "num_nextn_predict_layers"):
        del saved[name]
    rope = dict(saved.pop("rope_scaling"))
    rope["rope_type"] = rope.pop("type")
    saved |= {"rope_parameters": rope | {"rope_theta": 10000.0}, "num_mtp_layers": 1, "rope_interleave": True}
    assert load_model_config(write_config(tmp_path, saved)) == hub


def test_deepseek_v2_has_the_defaults_of_its_own_class(tmp_path: Path) -> None:
    written = hub_config("deepseek_v2", "tiny", "float32")
    for name in ("topk_method", "scoring_func", "norm_topk_prob", "n_group", "topk_group"):
        del written[name]
    moe = load_model_config(write_config(tmp_path, written)).moe
    assert moe is not None
    assert (moe.scoring, moe.topk_method, moe.norm_topk_prob) == ("softmax", "greedy", False)
    assert (moe.num_groups, moe.topk_groups) == (1, 1)


def test_moe_layer_freq_skips_layers(tmp_path: Path) -> None:
    written = hub_config("deepseek_v2", "tiny", "float32") | {"moe_layer_freq": 2}
    config = load_model_config(write_config(tmp_path, written))
    assert [config.is_moe_layer(i) for i in range(4)] == [False, False, True, False]


def test_llama_keeps_keys_and_values_per_head(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path, hub_config("llama", "tiny", "float32")))
    assert config.kv_token_shape == (2, 4, 32)
    assert config.moe is None
    assert not config.rope.interleave


def test_llama3_scaling_is_read(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    written = hub_config("llama", "tiny", "float32") | {"rope_scaling": scaling, "rope_theta": 500000.0}
    rope = load_model_config(write_config(tmp_path, written)).rope
    assert (rope.scaling, rope.factor, rope.theta, rope.original_max_position_embeddings) == (
        "llama3",
        32.0,
        500000.0,
        8192,
    )


def test_end_ids_of_both_files_count(tmp_path: Path) -> None:
    written = hub_config("llama", "tiny", "float32") | {"eos_token_id": 2}
    assert load_model_config(write_config(tmp_path, written, {"eos_token_id": [5, 7]})).eos_token_ids == {
        2,
        5,
        7,
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "model_type must be one of deepseek_v3, deepseek_v2, llama, found 'mamba'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "256"}, "hidden_size must be an integer of at least 1, found '256'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, found 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, found 'gelu'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method must be one of noaux_tc"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_scaling: type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method must be one of fp8, found 'awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size must be two positive integers"),
        ({"eos_token_id": 4096}, "eos_token_id 4096 is outside the vocabulary of 4096"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"n_group": 3}, "n_group = 3 must divide 16 experts"),
        ({"topk_group": 5}, "topk_group = 5 is more than n_group = 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than the 8 experts to choose from"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be even, found 15"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    message = error_of(tmp_path, hub_config("deepseek_v3", "tiny", "float32") | change)
    assert message.startswith(str(tmp_path / "config.json"))
    assert expected in message


def test_heads_must_be_a_multiple_of_kv_heads(tmp_path: Path) -> None:
    written = hub_config("llama", "tiny", "float32") | {"num_key_value_heads": 3}
    assert "num_key_value_heads = 3 must divide 8 heads" in error_of(tmp_path, written)


def test_broken_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        load_model_config(tmp_path)


def test_missing_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        load_model_config(tmp_path)


def test_config_that_is_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        load_model_config(tmp_path)
