"""DeepSeek-V2 and DeepSeek-V3: they differ in the gate and in configuration only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention.mla import load_mla_attention
from engine.attention.mla_kernels import kernels_fit
from engine.checkpoint.model_config import MlaConfig, ModelConfig, MoeConfig
from engine.checkpoint.weights import WeightSource
from engine.layers.fp8_linear import make_fp8_linear
from engine.layers.linear import Linear
from engine.layers.mlp import load_gated_mlp
from engine.layers.rotary import Rotary
from engine.models.decoder import Decoder, DecoderLayer, FeedForward, load_decoder, load_norm
from engine.models.mtp import MtpLayer
from engine.moe.dispatch import Dispatcher, LocalDispatcher
from engine.moe.experts import load_experts
from engine.moe.gate import load_gate
from engine.moe.moe_layer import MoeLayer


def build_deepseek(  # noqa: PLR0913 - two of them are rare and keyword-only
    config: ModelConfig,
    mla: MlaConfig,
    weights: WeightSource,
    dispatcher_for: Callable[[int], Dispatcher],
    device: torch.device | str,
    has_kernels: bool,
    *,
    has_fp8_weights: bool = False,
    has_mtp: bool = False,
) -> Decoder:
    uses_kernels = has_kernels and kernels_fit(mla)
    make_linear = make_fp8_linear if has_fp8_weights else Linear

    def load_layer(i: int) -> DecoderLayer:
        prefix = f"model.layers.{i}"
        feed_forward: FeedForward
        # The layer of multi-token prediction has experts whatever the layers before it have.
        if config.moe is not None and (config.is_moe_layer(i) or i == config.num_layers):
            dispatcher = dispatcher_for(i)
            if has_kernels and isinstance(dispatcher, LocalDispatcher) and not config.mlp_bias:
                feed_forward = _load_fused_moe(
                    config, config.moe, weights, f"{prefix}.mlp", is_fp8=has_fp8_weights
                )
            else:
                feed_forward = _load_moe_layer(config, config.moe, weights, f"{prefix}.mlp", dispatcher)
        else:
            sizes = (config.hidden_size, config.intermediate_size)
            feed_forward = load_gated_mlp(weights, f"{prefix}.mlp", *sizes, config.mlp_bias, make_linear)
        attention = load_mla_attention(
            config, mla, weights, f"{prefix}.self_attn", has_kernels=uses_kernels, make_linear=make_linear
        )
        return DecoderLayer(
            load_norm(config, weights, f"{prefix}.input_layernorm"),
            attention,
            load_norm(config, weights, f"{prefix}.post_attention_layernorm"),
            feed_forward,
        )

    rotary = Rotary(config.rope, mla.qk_rope_head_dim, device)

    def load_mtp(embedding_VD: torch.Tensor) -> MtpLayer:
        i, hidden = config.num_layers, config.hidden_size
        prefix = f"model.layers.{i}"
        names = ("enorm", "hnorm", "shared_head.norm")
        first, second, last = (load_norm(config, weights, f"{prefix}.{name}") for name in names)
        projection = Linear(weights.get(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)))
        return MtpLayer(embedding_VD, rotary, (first, second, last), projection, load_layer(i), i)

    decoder = load_decoder(config, weights, load_layer, rotary, load_mtp if has_mtp else None)
    decoder.uses_kernels = uses_kernels
    decoder.has_agreed_rows = not isinstance(dispatcher_for(config.num_layers - 1), LocalDispatcher)
    return decoder


def _load_fused_moe(
    config: ModelConfig, moe: MoeConfig, weights: WeightSource, prefix: str, *, is_fp8: bool
) -> FeedForward:
    from engine.moe.fused_experts import load_fused_moe  # needs Triton, which a CPU has no use for

    return load_fused_moe(moe, weights, prefix, config.hidden_size, is_fp8=is_fp8)


def _load_moe_layer(
    config: ModelConfig, moe: MoeConfig, weights: WeightSource, prefix: str, dispatcher: Dispatcher
) -> MoeLayer:
    hidden = config.hidden_size
    shared = None
    if moe.num_shared_experts:
        shared_size = moe.num_shared_experts * moe.moe_intermediate_size
        shared = load_gated_mlp(weights, f"{prefix}.shared_experts", hidden, shared_size, config.mlp_bias)
    return MoeLayer(
        load_gate(moe, weights, f"{prefix}.gate", hidden),
        dispatcher,
        load_experts(moe, weights, f"{prefix}.experts", hidden, dispatcher.local_experts),
        shared,
        moe.num_routed_experts,
    )
