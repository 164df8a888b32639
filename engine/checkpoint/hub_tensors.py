"""Which tensors a model has on the hub, by name and shape."""

from __future__ import annotations

from engine.checkpoint.model_config import MlaConfig, ModelConfig, MoeConfig

Shapes = dict[str, tuple[int, ...]]


def hub_tensors(config: ModelConfig, *, has_mtp: bool = False) -> Shapes:
    """Without biases: random checkpoints have none. has_mtp: with the first layer of multi-token prediction,
    without its copies of embedding and head."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        shapes |= _layer(f"model.layers.{i}", config, config.moe if config.is_moe_layer(i) else None)
    if has_mtp:
        shapes |= _mtp_layer(f"model.layers.{config.num_layers}", config)
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer(prefix: str, config: ModelConfig, moe: MoeConfig | None) -> Shapes:
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (config.hidden_size,),
        f"{prefix}.post_attention_layernorm.weight": (config.hidden_size,),
    }
    attention = f"{prefix}.self_attn"
    shapes |= _mla(attention, config, config.mla) if config.mla else _gqa(attention, config)
    if moe is not None:
        return shapes | _moe(f"{prefix}.mlp", config, moe)
    return shapes | _mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)


def _mtp_layer(prefix: str, config: ModelConfig) -> Shapes:
    hidden = config.hidden_size
    return {
        f"{prefix}.enorm.weight": (hidden,),
        f"{prefix}.hnorm.weight": (hidden,),
        f"{prefix}.eh_proj.weight": (hidden, 2 * hidden),
        f"{prefix}.shared_head.norm.weight": (hidden,),
    } | _layer(prefix, config, config.moe)


def _gqa(prefix: str, config: ModelConfig) -> Shapes:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        f"{prefix}.q_proj.weight": (q_size, config.hidden_size),
        f"{prefix}.k_proj.weight": (kv_size, config.hidden_size),
        f"{prefix}.v_proj.weight": (kv_size, config.hidden_size),
        f"{prefix}.o_proj.weight": (config.hidden_size, q_size),
    }


def _mla(prefix: str, config: ModelConfig, mla: MlaConfig) -> Shapes:
    heads, hidden = config.num_heads, config.hidden_size
    shapes: Shapes = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        f"{prefix}.kv_a_layernorm.weight": (mla.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        f"{prefix}.o_proj.weight": (hidden, heads * mla.v_head_dim),
    }
    if mla.q_lora_rank is None:
        shapes[f"{prefix}.q_proj.weight"] = (heads * config.head_dim, hidden)
    else:
        shapes[f"{prefix}.q_a_proj.weight"] = (mla.q_lora_rank, hidden)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (mla.q_lora_rank,)
        shapes[f"{prefix}.q_b_proj.weight"] = (heads * config.head_dim, mla.q_lora_rank)
    return shapes


def _mlp(prefix: str, hidden_size: int, intermediate_size: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (intermediate_size, hidden_size),
        f"{prefix}.up_proj.weight": (intermediate_size, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, intermediate_size),
    }


def _moe(prefix: str, config: ModelConfig, moe: MoeConfig) -> Shapes:
    hidden, size = config.hidden_size, moe.moe_intermediate_size
    shapes: Shapes = {f"{prefix}.gate.weight": (moe.num_routed_experts, hidden)}
    if moe.topk_method == "noaux_tc":
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (moe.num_routed_experts,)
    for i in range(moe.num_routed_experts):
        shapes |= _mlp(f"{prefix}.experts.{i}", hidden, size)
    if moe.num_shared_experts:
        shapes |= _mlp(f"{prefix}.shared_experts", hidden, size * moe.num_shared_experts)
    return shapes
