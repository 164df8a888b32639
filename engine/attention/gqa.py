"""Grouped-query attention over a paged cache of keys and values.

Groups of G query heads over K key-value heads, Q dims of a head. A cached row: keys [K, Q], values [K, Q].
"""

from __future__ import annotations

import torch

from engine.attention.causal import attend_causal
from engine.attention.device_plan import DevicePlan
from engine.attention.packed import PackedPlan, attend_packed
from engine.attention.plan import AttentionPlan, Chunk, pick_rows, write_rows
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.layers.linear import Linear
from engine.layers.rotary import interleave_rows, rotate_


class GqaAttention:
    def __init__(self, qkv: Linear, out: Linear, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """The query weights carry the softmax scale."""
        self._qkv = qkv
        self._out = out
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim

    def __call__(
        self,
        x_TD: torch.Tensor,
        cache: torch.Tensor,
        plan: AttentionPlan | DevicePlan | PackedPlan,
        rotations: torch.Tensor | None,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert not isinstance(plan, DevicePlan) and rotations is not None, "no kernels for this attention"
        q_size = self._num_heads * self._head_dim
        qkv = self._qkv(x_TD)
        num_rotated = self._num_heads + self._num_kv_heads
        rotate_(
            qkv[:, : num_rotated * self._head_dim].unflatten(-1, (num_rotated, -1)), rotations.unsqueeze(1)
        )
        write_rows(cache, plan.slots, qkv[:, q_size:], plan.stored_rows)
        if isinstance(plan, PackedPlan):
            q_THQ = qkv[:, :q_size].unflatten(-1, (self._num_heads, -1))
            return self._out(pick_rows(attend_packed(q_THQ, cache, plan).flatten(1), wanted_N))
        q_TKGQ = qkv[:, :q_size].unflatten(-1, (self._num_kv_heads, -1, self._head_dim))
        return self._out(pick_rows(self.attend(q_TKGQ, cache, plan).flatten(1), wanted_N))

    def attend(self, q_TKGQ: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """[T, K, G, Q] of rotated, scaled queries over rows already in the cache."""
        heads_TKGQ = torch.empty_like(q_TKGQ, memory_format=torch.contiguous_format)
        if plan.num_decodes:
            self._decode(q_TKGQ, cache, plan, heads_TKGQ)
        for chunk in plan.chunks:
            heads_TKGQ[chunk.start : chunk.end] = _prefill(q_TKGQ[chunk.start : chunk.end], cache, chunk)
        return heads_TKGQ

    def _decode(
        self, q_TKGQ: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan, out_TKGQ: torch.Tensor
    ) -> None:
        padded = plan.padded_decodes
        if padded is None:
            for s, context in enumerate(plan.decodes):
                k_KLQ, v_KLQ = context.rows(cache).permute(1, 2, 0, 3)
                probs_KGL = torch.softmax(torch.bmm(q_TKGQ[s], k_KLQ.transpose(1, 2)), dim=-1)
                torch.bmm(probs_KGL, v_KLQ, out=out_TKGQ[s])
            return
        rows = padded.rows(cache)
        for head in range(self._num_kv_heads):
            scores_SGL = torch.bmm(q_TKGQ[: plan.num_decodes, head], rows[:, :, 0, head].transpose(1, 2))
            if padded.bias_S1L is not None:
                scores_SGL += padded.bias_S1L
            probs_SGL = torch.softmax(scores_SGL, dim=-1)
            out_TKGQ[: plan.num_decodes, head] = torch.bmm(probs_SGL, rows[:, :, 1, head])


def _prefill(q_nKGQ: torch.Tensor, cache: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    k_KLQ, v_KLQ = chunk.context.rows(cache).permute(1, 2, 0, 3)
    return attend_causal(q_nKGQ.permute(1, 2, 0, 3), k_KLQ, v_KLQ).permute(2, 0, 1, 3)


def load_gqa_attention(config: ModelConfig, weights: WeightSource, prefix: str) -> GqaAttention:
    heads, kv_heads, hidden = config.num_heads, config.num_kv_heads, config.hidden_size
    sizes = {"q": heads * config.head_dim, "k": kv_heads * config.head_dim, "v": kv_heads * config.head_dim}
    parts = {
        name: weights.get(f"{prefix}.{name}_proj.weight", (size, hidden)) for name, size in sizes.items()
    }
    qkv_bias = out_bias = None
    if config.attention_bias:
        biases = {name: weights.get(f"{prefix}.{name}_proj.bias", (size,)) for name, size in sizes.items()}
        qkv_bias = _fuse(config, biases)
        out_bias = weights.get(f"{prefix}.o_proj.bias", (hidden,))
    out_weight = weights.get(f"{prefix}.o_proj.weight", (hidden, sizes["q"]))
    return GqaAttention(
        Linear(_fuse(config, parts), qkv_bias), Linear(out_weight, out_bias), heads, kv_heads, config.head_dim
    )


def _fuse(config: ModelConfig, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Queries, keys, values below each other; queries scaled, pairs interleaved."""
    query, key = parts["q"], parts["k"]
    if not config.rope.interleave:
        query, key = (_interleave_heads(part, config.head_dim) for part in (query, key))
    return torch.cat((query * config.head_dim**-0.5, key, parts["v"]))


def _interleave_heads(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return torch.cat([interleave_rows(head) for head in weight.split(head_dim)])
