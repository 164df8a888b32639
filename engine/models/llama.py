from __future__ import annotations

import torch

from engine.attention.gqa import load_gqa_attention
from engine.attention.packed import can_pack, plan_packed
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.layers.mlp import load_gated_mlp
from engine.layers.rotary import Rotary
from engine.models.decoder import Decoder, DecoderLayer, load_decoder, load_norm


def build_llama(
    config: ModelConfig, weights: WeightSource, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    def load_layer(i: int) -> DecoderLayer:
        prefix = f"model.layers.{i}"
        return DecoderLayer(
            load_norm(config, weights, f"{prefix}.input_layernorm"),
            load_gqa_attention(config, weights, f"{prefix}.self_attn"),
            load_norm(config, weights, f"{prefix}.post_attention_layernorm"),
            load_gated_mlp(
                weights, f"{prefix}.mlp", config.hidden_size, config.intermediate_size, config.mlp_bias
            ),
        )

    decoder = load_decoder(config, weights, load_layer, Rotary(config.rope, config.head_dim, device))
    if can_pack(device, dtype, config.head_dim):
        decoder.plan_rows = plan_packed
    return decoder
