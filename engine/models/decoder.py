"""The decoder that all supported models are: embedding, layers of attention and feed-forward, norm, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from engine.attention.plan import AttentionPlan, plan_attention
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import Rotary
from engine.models.causal_lm import LayerDone
from engine.moe.moe_layer import MoeLayer

if TYPE_CHECKING:
    from engine.kv_cache import KvCache


class Attention(Protocol):
    def __call__(
        self, x_TD: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan, rotations: torch.Tensor
    ) -> torch.Tensor:
        """Write the batch's rows to this layer's cache and attend. rotations: complex64 [T, R / 2]."""
        ...


FeedForward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    feed_forward_norm: RmsNorm
    feed_forward: FeedForward


class Decoder:
    def __init__(
        self,
        embedding_VD: torch.Tensor,
        rotary: Rotary,
        layers: list[DecoderLayer],
        norm: RmsNorm,
        head: Linear,
    ) -> None:
        self._embedding_VD = embedding_VD
        self._rotary = rotary
        self._layers = layers
        self._norm = norm
        self._head = head
        self._moe_layers = [
            layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MoeLayer)
        ]

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv_cache: KvCache, layer_done: LayerDone | None = None
    ) -> torch.Tensor:
        x_TD = functional.embedding(batch.token_ids_T, self._embedding_VD)
        rotations = self._rotary.rotations(batch.positions_T)
        plan = plan_attention(batch, kv_cache.layer(0))
        for i, layer in enumerate(self._layers):
            x_TD += layer.attention(layer.attention_norm(x_TD), kv_cache.layer(i), plan, rotations)
            x_TD += layer.feed_forward(layer.feed_forward_norm(x_TD))
            if layer_done is not None:
                layer_done(i)
        return self._norm(x_TD)

    @torch.inference_mode()
    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_ND).float()

    def take_expert_load(self) -> torch.Tensor | None:
        if not self._moe_layers:
            return None
        return torch.stack([layer.take_load() for layer in self._moe_layers])


def load_decoder(
    config: ModelConfig, weights: WeightSource, load_layer: Callable[[int], DecoderLayer], rotary: Rotary
) -> Decoder:
    shape = (config.vocab_size, config.hidden_size)
    embedding_VD = weights.get("model.embed_tokens.weight", shape)
    layers = [load_layer(i) for i in range(config.num_layers)]
    norm = load_norm(config, weights, "model.norm")
    head = Linear(embedding_VD if config.tie_word_embeddings else weights.get("lm_head.weight", shape))
    return Decoder(embedding_VD, rotary, layers, norm, head)


def load_norm(config: ModelConfig, weights: WeightSource, name: str) -> RmsNorm:
    return RmsNorm(weights.get(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)
