"""The decoder that all supported models are: embedding, layers of attention and feed-forward, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.nn import functional

from engine.attention.device_plan import DevicePlan
from engine.attention.packed import PackedPlan
from engine.attention.plan import AttentionPlan, pick_rows, plan_attention
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import Rotary
from engine.models.causal_lm import LayerDone
from engine.moe.moe_layer import CountsExperts

if TYPE_CHECKING:
    from engine.kv_cache import KvCache
    from engine.models.mtp import MtpLayer


class Attention(Protocol):
    def __call__(
        self,
        x_TD: torch.Tensor,
        cache: torch.Tensor,
        plan: AttentionPlan | DevicePlan | PackedPlan,
        rotations: torch.Tensor | None,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the batch's rows to this layer's cache and attend. rotations: complex64 [T, R / 2]; none for
        kernels, which have a DevicePlan and rotate by themselves. Returns [T, D], or with wanted_N [N, D] of
        these rows."""
        ...


FeedForward = Callable[[torch.Tensor], torch.Tensor]
PlanRows = Callable[[ForwardBatch, torch.Tensor], AttentionPlan | PackedPlan]  # by any layer's cache


@runtime_checkable
class JoinsNorms(Protocol):
    """A feed-forward layer whose kernels take in the sums and norms on both sides of it."""

    def between_norms(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor, norm: RmsNorm, next_norm: RmsNorm
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    feed_forward_norm: RmsNorm
    feed_forward: FeedForward

    def feed(
        self, x_TD: torch.Tensor, attended_TD: torch.Tensor, next_norm: RmsNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream behind this layer, and its next norm. x may change in place."""
        if isinstance(self.feed_forward, JoinsNorms):
            return self.feed_forward.between_norms(x_TD, attended_TD, self.feed_forward_norm, next_norm)
        fed_TD = self.feed_forward(self.feed_forward_norm.add_(x_TD, attended_TD))
        return x_TD, next_norm.add_(x_TD, fed_TD)

    def uncounted(self) -> DecoderLayer:
        """The same layer, whose tokens do not count as expert load."""
        if not isinstance(self.feed_forward, CountsExperts):
            return self
        return replace(self, feed_forward=self.feed_forward.uncounted())


class Decoder:
    def __init__(
        self,
        embedding_VD: torch.Tensor,
        rotary: Rotary,
        layers: list[DecoderLayer],
        norm: RmsNorm,
        head: Linear,
        mtp: MtpLayer | None = None,
    ) -> None:
        self.vocab_size = embedding_VD.shape[0]
        self.dtype = embedding_VD.dtype
        self.uses_kernels = False
        self.plan_rows: PlanRows = plan_attention  # where no kernels are used
        self.has_agreed_rows = False  # with other ranks: every layer has all rows of the batch
        self._embedding_VD = embedding_VD
        self._rotary = rotary
        self._layers = layers
        self._last_of_wanted = layers[-1].uncounted()
        self._norm = norm
        self._head = head
        self.mtp = mtp
        all_layers = layers if mtp is None else [*layers, mtp.decoder_layer]
        self._moe_layers = [
            layer.feed_forward for layer in all_layers if isinstance(layer.feed_forward, CountsExperts)
        ]

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        layer_done: LayerDone | None = None,
        *,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_TD = functional.embedding(batch.token_ids_T, self._embedding_VD)
        plan, rotations = plan_batch(batch, kv_cache.layer(0), self._rotary, self.plan_rows)
        normed_TD = self._layers[0].attention_norm(x_TD)
        for i, layer in enumerate(self._layers):
            is_last = i + 1 == len(self._layers)
            kept_N = wanted_N if is_last and not self.has_agreed_rows else None
            attended_TD = layer.attention(normed_TD, kv_cache.layer(i), plan, rotations, kept_N)
            if layer_done is not None:
                layer_done(i)
            if kept_N is not None:
                return self._finish(pick_rows(x_TD, kept_N), attended_TD)
            next_norm = self._norm if is_last else self._layers[i + 1].attention_norm
            x_TD, normed_TD = layer.feed(x_TD, attended_TD, next_norm)
        return pick_rows(normed_TD, wanted_N)

    def _finish(self, x_ND: torch.Tensor, attended_ND: torch.Tensor) -> torch.Tensor:
        """What is left of the wanted rows behind the last attention."""
        if x_ND.shape[0] == 0:
            return x_ND
        return self._last_of_wanted.feed(x_ND, attended_ND, self._norm)[1]

    @contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """And the last: it may compute fewer rows than the others of its kind."""
        layers = self._layers
        self._layers = [*{type(layer.feed_forward): layer for layer in layers[:-1]}.values(), layers[-1]]
        try:
            yield
        finally:
            self._layers = layers

    @torch.inference_mode()
    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_ND).float()

    @torch.inference_mode()
    def logits_into(self, out_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """As logits(), in the dtype of the model."""
        self._head.into(out_NV, hidden_ND)

    def take_expert_load(self) -> torch.Tensor | None:
        if not self._moe_layers:
            return None
        return torch.stack([layer.take_load() for layer in self._moe_layers])


def plan_batch(
    batch: ForwardBatch, cache: torch.Tensor, rotary: Rotary, plan_rows: PlanRows = plan_attention
) -> tuple[AttentionPlan | DevicePlan | PackedPlan, torch.Tensor | None]:
    """What attention needs beside the rows; cache: any layer's."""
    if batch.device_plan is not None:
        return batch.device_plan, None
    return plan_rows(batch, cache), rotary.rotations(batch.positions_T)


LoadMtp = Callable[[torch.Tensor], "MtpLayer"]  # from the embedding


def load_decoder(
    config: ModelConfig,
    weights: WeightSource,
    load_layer: Callable[[int], DecoderLayer],
    rotary: Rotary,
    load_mtp: LoadMtp | None = None,
) -> Decoder:
    shape = (config.vocab_size, config.hidden_size)
    embedding_VD = weights.get("model.embed_tokens.weight", shape)
    layers = [load_layer(i) for i in range(config.num_layers)]
    norm = load_norm(config, weights, "model.norm")
    head = Linear(embedding_VD if config.tie_word_embeddings else weights.get("lm_head.weight", shape))
    mtp = None if load_mtp is None else load_mtp(embedding_VD)
    return Decoder(embedding_VD, rotary, layers, norm, head, mtp)


def load_norm(config: ModelConfig, weights: WeightSource, name: str) -> RmsNorm:
    return RmsNorm(weights.get(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)
