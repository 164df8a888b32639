import json
import math
from pathlib import Path

import torch

from engine.checkpoint.model_config import ModelConfig, load_model_config
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.weights import WeightSource, open_weights

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def dummy(directory: Path, **changes: object) -> tuple[ModelConfig, WeightSource]:
    config_json = hub_config("deepseek_v3", "tiny", "float32") | changes
    (directory / "config.json").write_text(json.dumps(config_json))
    config = load_model_config(directory)
    with open_weights(directory, "dummy", torch.float32, config) as weights:
        return config, weights


def test_a_dummy_tensor_depends_on_its_name_only(tmp_path: Path) -> None:
    _, first = dummy(tmp_path)
    _, second = dummy(tmp_path)
    assert torch.equal(first.get(UP, (512, 256)), second.get(UP, (512, 256)))
    assert not torch.equal(first.get(UP, (256, 256)), first.get(DOWN, (256, 256)))


def test_dummy_matrices_keep_the_scale_of_their_input(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path)
    weight = weights.get(UP, (2048, 1024))
    assert math.isclose(float(weight.std()) * math.sqrt(1024), 1.0, rel_tol=0.01)
    assert torch.equal(weights.get("model.norm.weight", (8,)), torch.ones(8))


def test_rows_of_a_dummy_matrix_larger_than_the_pool_differ(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path)
    weight = weights.get(UP, (3000, 1024))
    assert torch.unique(weight[:, :8], dim=0).shape[0] == 3000


def test_dummy_tensors_have_the_asked_dtype_and_are_owned(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path)
    tensor = weights.get(UP, (4, 4), torch.bfloat16)
    assert tensor.dtype == torch.bfloat16
    tensor.zero_()
    assert weights.get(UP, (4, 4)).abs().sum() > 0


def test_dummy_head_is_the_embedding_when_tied(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path, tie_word_embeddings=True)
    embedding = weights.get("model.embed_tokens.weight", (64, 16))
    assert torch.equal(weights.get("lm_head.weight", (64, 16)), embedding)


def test_dummy_biases_exist_as_the_config_says(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path)
    assert not weights.has("model.layers.0.self_attn.o_proj.bias")
    _, biased = dummy(tmp_path, attention_bias=True)
    assert biased.has("model.layers.0.self_attn.o_proj.bias")


def test_uniform_dummy_weights_are_alike_in_all_layers_and_differ_between_experts(tmp_path: Path) -> None:
    _, weights = dummy(tmp_path, baton_dummy_spread="uniform")
    other_layer = weights.get(UP.replace("layers.0", "layers.11"), (512, 256))
    assert torch.equal(weights.get(UP, (512, 256)), other_layer)
    experts = [weights.get(f"model.layers.3.mlp.experts.{e}.up_proj.weight", (64, 32)) for e in (0, 1)]
    assert not torch.equal(*experts)
    head = weights.get("lm_head.weight", (512, 256))
    assert torch.equal(head, weights.get("model.embed_tokens.weight", (512, 256)))
    norms = [weights.get(f"model.layers.1.{n}_layernorm.weight", (256,)) for n in ("input", "post_attention")]
    assert torch.equal(*norms)
    for tensor in (*experts, head, *norms):
        assert 0.9e-3 < float(tensor.abs().max()) <= 1e-3
        assert abs(float(tensor.mean())) < 2e-4


def test_the_gate_of_tied_dummy_weights_prefers_no_expert(tmp_path: Path) -> None:
    gate = "model.layers.3.mlp.gate.weight"
    _, uniform = dummy(tmp_path, baton_dummy_spread="uniform")
    assert bool(uniform.get(gate, (8, 256), torch.float32).any())
    _, tied = dummy(tmp_path, baton_dummy_spread="tied")
    assert not bool(tied.get(gate, (8, 256), torch.float32).any())
    assert torch.equal(tied.get(UP, (512, 256)), uniform.get(UP, (512, 256)))
