"""Every supported variant against transformers on small random checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import load_ours, random_reference

DEEPSEEK = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def v3(**changes: Any) -> transformers.PreTrainedConfig:
    return transformers.DeepseekV3Config(**(DEEPSEEK | changes))


def v2(**changes: Any) -> transformers.PreTrainedConfig:
    base = DEEPSEEK | {"n_shared_experts": 2, "routed_scaling_factor": 1.0}
    return transformers.DeepseekV2Config(**(base | changes))


def llama(**changes: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**(LLAMA | changes))


VARIANTS = {
    "v3": lambda: v3(),
    "v3_no_q_lora": lambda: v3(q_lora_rank=None),
    "v3_yarn": lambda: v3(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}),
    "v3_yarn_no_mscale": lambda: v3(rope_parameters=YARN),
    "v3_half_rope": lambda: v3(rope_interleave=False),
    "v3_half_rope_no_q_lora": lambda: v3(rope_interleave=False, q_lora_rank=None),
    "v3_unnormed_one_group": lambda: v3(norm_topk_prob=False, n_group=1, topk_group=1),
    "v3_biased": lambda: v3(attention_bias=True),
    "v3_biased_no_q_lora": lambda: v3(attention_bias=True, q_lora_rank=None),
    "v3_all_dense": lambda: v3(first_k_dense_replace=3),
    "v2_greedy": lambda: v2(topk_method="greedy", q_lora_rank=None, n_group=None, topk_group=None),
    "v2_group_limited": lambda: v2(topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "v2_yarn": lambda: v2(
        topk_method="greedy", rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
    ),
    "v2_tied": lambda: v2(topk_method="greedy", tie_word_embeddings=True),
    "llama": lambda: llama(),
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_llama3_rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama_biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama_one_kv_head": lambda: llama(num_key_value_heads=1, head_dim=16),
    "llama_no_groups": lambda: llama(num_key_value_heads=6),
}


def random_prompts(lengths: list[int]) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(2, 211) for _ in range(length)] for length in lengths]


@pytest.fixture(params=VARIANTS)
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> transformers.PreTrainedModel:
    model = random_reference(VARIANTS[request.param]())
    model.save_pretrained(tmp_path)
    return model


@torch.inference_mode()
def test_logits_and_greedy_tokens_match_transformers(
    reference: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    driver = load_ours(tmp_path)
    prompts = random_prompts([1, 5, 23, 90])

    expected = reference(torch.tensor([prompts[3]])).logits[0]
    for chunk_size in (90, 32, 7):
        found = driver.prompt_logits(prompts[3], chunk_size)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()

    for prompt, generated in zip(prompts, driver.generate(prompts, 64), strict=True):
        assert generated == greedy_after(reference, prompt, generated)


def greedy_after(model: transformers.PreTrainedModel, prompt: list[int], generated: list[int]) -> list[int]:
    """The model's own choice after the prompt and after each generated token, in one pass. By induction it is
    `generated` exactly when greedy decoding makes `generated`."""
    logits = model(torch.tensor([prompt + generated[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
