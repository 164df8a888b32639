"""The layer of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Row i joins the main model's hidden state of token i - 1 with the embedding of token i, passes one decoder
layer, and predicts token i + 1. Its KV is one more layer of the cache: slot i depends on tokens up to i and
no further, like every other layer's, so a block's content stays a function of its hash chain. Token 0 has no
predecessor: slot 0 holds nothing, and no row of this layer attends to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from engine.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import Rotary
from engine.models.decoder import DecoderLayer, plan_batch

if TYPE_CHECKING:
    from engine.kv_cache import KvCache

FIRST_TOKEN = 1  # of the contexts of this layer


class MtpLayer:
    def __init__(
        self,
        embedding_VD: torch.Tensor,
        rotary: Rotary,
        norms: tuple[RmsNorm, RmsNorm, RmsNorm],
        projection: Linear,
        layer: DecoderLayer,
        cache_layer: int,
    ) -> None:
        """norms: of the embedding, of the hidden state, of the result. Embedding and head are the main
        model's."""
        self.decoder_layer = layer
        self.cache_layer = cache_layer
        self.embedding_VD = embedding_VD
        self._rotary = rotary
        self._embedding_norm, self._hidden_norm, self._norm = norms
        self._projection = projection

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, previous_TD: torch.Tensor, kv_cache: KvCache) -> torch.Tensor:
        """hidden_TD for the main model's head, after the norm. previous_TD: the hidden state of each row's
        predecessor; the batch's contexts begin at FIRST_TOKEN. Zero rows are an idle step."""
        embedded_TD = functional.embedding(batch.token_ids_T, self.embedding_VD)
        joined = torch.cat((self._embedding_norm(embedded_TD), self._hidden_norm(previous_TD)), dim=1)
        x_TD = self._projection(joined)
        cache = kv_cache.layer(self.cache_layer)
        plan, rotations = plan_batch(batch, cache, self._rotary)
        layer = self.decoder_layer
        attended_TD = layer.attention(layer.attention_norm(x_TD), cache, plan, rotations)
        return layer.feed(x_TD, attended_TD, self._norm)[1]
