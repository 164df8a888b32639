"""A GGUF file of the llama architecture as config.json and tensors under hub names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.gguf_file import GgufFile

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1: by what each frequency is divided


@dataclass(frozen=True, slots=True)
class MappedTensor:
    name: str  # on the hub
    gguf_name: str
    num_heads: int | None  # of a query or key projection: its rows are in llama.cpp's order


def hub_config(gguf: GgufFile, dtype: torch.dtype) -> dict[str, Any]:
    """Raises CheckpointError for another architecture, experts, or missing metadata."""
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{gguf.path}: architecture must be llama, found {architecture!r}")
    if metadata.get("llama.expert_count"):
        raise CheckpointError(f"{gguf.path}: llama with experts (Mixtral) is not supported")
    num_heads = _required(gguf, "llama.attention.head_count")
    hidden_size = _required(gguf, "llama.embedding_length")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // num_heads)
    embedding = gguf.tensors.get("token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0] if embedding else _required(gguf, "llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _required(gguf, "llama.feed_forward_length"),
        "num_hidden_layers": _required(gguf, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": _required(gguf, "llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _required(gguf, "llama.context_length"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, head_dim),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return {name: value for name, value in config.items() if value is not None or name == "rope_scaling"}


def mapped_tensors(gguf: GgufFile, config: dict[str, Any]) -> Iterator[MappedTensor]:
    """Raises CheckpointError for a tensor that has no place in a llama model."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for gguf_name in gguf.tensors:
        match = _LAYER_PATTERN.fullmatch(gguf_name)
        if gguf_name in _OUTER:
            yield MappedTensor(_OUTER[gguf_name], gguf_name, None)
        elif match and match[2] in _IN_LAYER:
            name = f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"
            yield MappedTensor(name, gguf_name, heads.get(match[2]))
        elif gguf_name != _ROPE_FACTORS:
            raise CheckpointError(f"{gguf.path}: tensor {gguf_name} is not one of a llama model")


def read_mapped(gguf: GgufFile, mapped: MappedTensor, dtype: torch.dtype) -> torch.Tensor:
    values = gguf.read(mapped.gguf_name)
    if mapped.num_heads is not None:
        values = _halves_from_pairs(values, mapped.num_heads)
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)


def _halves_from_pairs(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp rotates rows (0, 1), (2, 3), ... of a head; the hub's llama (0, d/2), (1, d/2 + 1), ..."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _required(gguf: GgufFile, key: str) -> Any:
    value = gguf.metadata.get(key)
    if value is None or isinstance(value, list):
        raise CheckpointError(f"{gguf.path}: metadata {key} must be one number, found {value!r}")
    return value


def _rope_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any] | None:
    metadata = gguf.metadata
    if _ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, head_dim)
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _required(gguf, "llama.rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _required(
            gguf, "llama.rope.scaling.original_context_length"
        )
    elif kind != "linear":
        raise CheckpointError(f"{gguf.path}: rope scaling {kind!r} is not supported")
    return scaling


def _llama3_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1 to 3.3. Raises CheckpointError if they do not explain the factors."""
    factors = gguf.read(_ROPE_FACTORS)
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    theta = gguf.metadata.get("llama.rope.freq_base", 10000.0)
    rotations = original / (2 * np.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(f"{gguf.path}: {_ROPE_FACTORS} is not the rope scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
