"""A checkpoint's config.json as the engine sees it.

Two spellings exist of the same model: the hub's (rope_theta, rope_scaling, topk_method, scoring_func,
moe_layer_freq) and that of transformers 5 (all of rope inside rope_parameters, the gate's methods left out).
Both are read; absent fields have the defaults of the transformers classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.checkpoint.json_fields import JsonFields, read_json_object
from engine.checkpoint.rope_config import RopeConfig, read_rope_config

__all__ = ["MODEL_TYPES", "MlaConfig", "ModelConfig", "MoeConfig", "RopeConfig", "load_model_config"]

ModelType = Literal["deepseek_v3", "deepseek_v2", "llama"]
DummySpread = Literal["variance", "uniform", "tied"]
DUMMY_SPREADS = ("variance", "uniform", "tied")
MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "llama")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    q_lora_rank: int | None  # None: one query projection
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    num_routed_experts: int
    num_shared_experts: int  # merged in one MLP of width num_shared_experts * moe_intermediate_size
    num_experts_per_token: int
    moe_intermediate_size: int
    first_dense_layers: int
    moe_layer_freq: int
    scoring: Literal["sigmoid", "softmax"]
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    num_groups: int
    topk_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys; with MLA qk_nope_head_dim + qk_rope_head_dim
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: frozenset[int]  # of config.json and generation_config.json
    mla: MlaConfig | None
    moe: MoeConfig | None
    num_mtp_layers: int
    fp8_block_shape: (
        tuple[int, int] | None
    )  # rows, columns that share one scale; None: weights are not quantised
    dummy_spread: DummySpread  # of made-up weights: a field of ours, for benchmarks

    def is_moe_layer(self, layer: int) -> bool:
        moe = self.moe
        return moe is not None and layer >= moe.first_dense_layers and layer % moe.moe_layer_freq == 0

    @property
    def kv_token_shape(self) -> tuple[int, ...]:
        """Of one token in one layer's cache: latent and rope key with MLA, else keys and values by head."""
        if self.mla is not None:
            return (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim,)
        return (2, self.num_kv_heads, self.head_dim)


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read config.json, and the eos_token_id of generation_config.json if there. Raises CheckpointError."""
    model_dir = Path(model_dir)
    path = model_dir / "config.json"
    generation_path = model_dir / "generation_config.json"
    fields = JsonFields(str(path), read_json_object(path))
    generation = read_json_object(generation_path) if generation_path.exists() else {}
    config = _model_config(fields, JsonFields(str(generation_path), generation))
    _check(config, fields)
    return config


def _model_config(fields: JsonFields, generation: JsonFields) -> ModelConfig:
    model_type: Any = fields.choice("model_type", "", MODEL_TYPES)
    dummy_spread: Any = fields.choice("baton_dummy_spread", "variance", DUMMY_SPREADS)
    fields.choice("hidden_act", "silu", ("silu",))
    num_heads = fields.integer("num_attention_heads")
    mla = None if model_type == "llama" else _mla_config(fields)
    if mla is None:
        head_dim = fields.integer("head_dim", None) or fields.integer("hidden_size") // num_heads
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    else:
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        num_kv_heads = num_heads
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope_config(
            fields, is_interleaved=model_type != "llama" and fields.boolean("rope_interleave", True)
        ),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        bos_token_id=fields.integer("bos_token_id", None, minimum=0),
        eos_token_ids=_token_ids(fields) | _token_ids(generation),
        mla=mla,
        moe=None if model_type == "llama" else _moe_config(fields, model_type),
        num_mtp_layers=_num_mtp_layers(fields),
        fp8_block_shape=_fp8_block_shape(fields),
        dummy_spread=dummy_spread,
    )


def _token_ids(fields: JsonFields, name: str = "eos_token_id") -> frozenset[int]:
    value = fields.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise fields.error(name, f"must be a token id or a list of token ids, found {value!r}")
    return frozenset(ids)


def _num_mtp_layers(fields: JsonFields) -> int:
    name = "num_mtp_layers" if fields.has("num_mtp_layers") else "num_nextn_predict_layers"
    return int(fields.integer(name, 0, minimum=0))


def _mla_config(fields: JsonFields) -> MlaConfig:
    return MlaConfig(
        q_lora_rank=fields.integer("q_lora_rank", None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )


def _moe_config(fields: JsonFields, model_type: ModelType) -> MoeConfig | None:
    if not fields.has("n_routed_experts"):
        return None
    is_v3 = model_type == "deepseek_v3"
    topk_methods = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    scoring: Any = fields.choice("scoring_func", "sigmoid" if is_v3 else "softmax", ("sigmoid", "softmax"))
    topk_method: Any = fields.choice("topk_method", topk_methods[0], topk_methods)
    num_groups = fields.integer("n_group", 1)
    return MoeConfig(
        num_routed_experts=fields.integer("n_routed_experts"),
        num_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),
        num_experts_per_token=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        first_dense_layers=fields.integer("first_k_dense_replace", 3 if is_v3 else 0, minimum=0),
        moe_layer_freq=fields.integer("moe_layer_freq", 1),
        scoring=scoring,
        topk_method=topk_method,
        num_groups=num_groups,
        topk_groups=fields.integer("topk_group", num_groups),
        norm_topk_prob=fields.boolean("norm_topk_prob", is_v3),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
    )


def _fp8_block_shape(fields: JsonFields) -> tuple[int, int] | None:
    if not fields.has("quantization_config"):
        return None
    quantization = fields.child("quantization_config")
    quantization.choice("quant_method", "", ("fp8",))
    quantization.choice("fmt", "e4m3", ("e4m3",))
    shape = quantization.values.get("weight_block_size")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise quantization.error("weight_block_size", f"must be two positive integers, found {shape!r}")
    return (shape[0], shape[1])


def _check(config: ModelConfig, fields: JsonFields) -> None:
    """Facts that must fit together, because a wrong one would show only as a shape error deep in a layer."""
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"= {config.num_kv_heads} must divide {config.num_heads} heads"
        )
    rotary_dim = config.mla.qk_rope_head_dim if config.mla else config.head_dim
    if rotary_dim % 2:
        raise fields.error(
            "qk_rope_head_dim" if config.mla else "head_dim", f"must be even, found {rotary_dim}"
        )
    outside = [i for i in config.eos_token_ids if i >= config.vocab_size]
    if outside:
        raise fields.error("eos_token_id", f"{outside[0]} is outside the vocabulary of {config.vocab_size}")
    moe = config.moe
    if moe is None:
        return
    if moe.num_routed_experts % moe.num_groups:
        raise fields.error("n_group", f"= {moe.num_groups} must divide {moe.num_routed_experts} experts")
    if moe.topk_groups > moe.num_groups:
        raise fields.error("topk_group", f"= {moe.topk_groups} is more than n_group = {moe.num_groups}")
    num_eligible = moe.num_routed_experts // moe.num_groups * moe.topk_groups
    if moe.num_experts_per_token > num_eligible:
        raise fields.error(
            "num_experts_per_tok",
            f"= {moe.num_experts_per_token} is more than the {num_eligible} experts to choose from",
        )
