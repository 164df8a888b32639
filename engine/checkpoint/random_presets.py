"""config.json of random checkpoints: the hub's spelling, every field that some loader insists on."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.errors import CheckpointError

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
PRESETS = ("tiny", "small576", "tiny_mtp")  # the last: tiny with a layer of multi-token prediction

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096},
    "small576": {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 32000},
}
_MLA_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    "small576": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}
_Q_LORA_RANK = {"tiny": 96, "small576": 256}
_EXPERT_SIZE = {"tiny": 128, "small576": 256}
_GATES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}


def hub_config(arch: str, preset: str, dtype_name: str) -> dict[str, Any]:
    """small576 of deepseek_v3 has 64.6 M parameters and the latent (512 + 64) that CPU peers insist on.
    CheckpointError where the architecture has no such preset."""
    has_mtp = preset == "tiny_mtp"
    if has_mtp:
        if arch != "deepseek_v3":
            raise CheckpointError(f"{arch} has no layers of multi-token prediction: preset tiny_mtp is of v3")
        preset = "tiny"
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "torch_dtype": dtype_name,
    }
    config |= _COMMON | _SIZES[preset]
    if arch == "llama":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        return config | {"num_key_value_heads": 4, "head_dim": head_dim, "mlp_bias": False}
    experts = {
        "n_routed_experts": 16,
        "moe_intermediate_size": _EXPERT_SIZE[preset],
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    }
    q_lora_rank = _Q_LORA_RANK[preset] if arch == "deepseek_v3" else None
    config |= _MLA_SIZES[preset] | {"q_lora_rank": q_lora_rank} | experts | _GATES[arch]
    return config | {"num_nextn_predict_layers": 1} if has_mtp else config
