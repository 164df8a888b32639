"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a paged cache of latents.

A cached row is the normed latent (C = kv_lora_rank) and the rotated key that all heads share (R). Decode
works on the latents: the key expansion is absorbed into the query, the value expansion follows the weighted
sum. A prompt chunk does the same or expands its context's keys and values, whichever multiplies less.

H heads, N query dims without position, V value dims of a head.
"""

from __future__ import annotations

import torch

from engine.attention.causal import attend_causal
from engine.attention.device_plan import DevicePlan
from engine.attention.mla_kernels import MlaKernels
from engine.attention.packed import PackedPlan
from engine.attention.plan import AttentionPlan, Chunk, pick_rows, write_rows
from engine.checkpoint.model_config import MlaConfig, ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.kernels.row_task import RowTask
from engine.layers.fp8_linear import Fp8Linear, MakeLinear
from engine.layers.linear import Linear
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import (
    attention_factor,
    interleave_rows,
    inverse_frequencies,
    rotate_,
    yarn_mscale,
)

_LATENT_NORM_EPS = 1e-6  # fixed in the published code, whatever rms_norm_eps says


class MlaAttention:
    def __init__(
        self,
        config: MlaConfig,
        down: Linear | Fp8Linear,
        query: tuple[RmsNorm, Linear | Fp8Linear] | None,
        latent_norm: RmsNorm,
        expansion: tuple[torch.Tensor, torch.Tensor],
        out: Linear | Fp8Linear,
    ) -> None:
        """down: hidden -> latent | shared key | query latent (or the query itself if query is None).
        expansion: key [H, N, C] and value [H, C, V]. The query weights carry the softmax scale."""
        self._config = config
        self._down = down
        self._query = query
        self._latent_norm = latent_norm
        self._key_HNC, self._value_HCV = expansion
        self._out = out
        self.kernels: MlaKernels | None = None

    def __call__(
        self,
        x_TD: torch.Tensor,
        cache: torch.Tensor,
        plan: AttentionPlan | DevicePlan | PackedPlan,
        rotations: torch.Tensor | None,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A DevicePlan needs kernels; an AttentionPlan needs rotations; others are not for this attention."""
        assert not isinstance(plan, PackedPlan)
        row_size = self._config.kv_lora_rank + self._config.qk_rope_head_dim
        down = self._down(x_TD)
        rows_T = down[:, :row_size]
        if isinstance(plan, DevicePlan):
            assert self.kernels is not None
            heads = self.kernels(rows_T, self._split_queries(down[:, row_size:]), cache, plan)
            return self._out(pick_rows(heads.flatten(1), wanted_N))
        assert rotations is not None
        self._latent_norm.apply_(rows_T[:, : self._config.kv_lora_rank])
        rotate_(rows_T[:, self._config.kv_lora_rank :], rotations)
        write_rows(cache, plan.slots, rows_T, plan.stored_rows)
        heads_THV = self.attend(self._queries(down[:, row_size:], rotations), cache, plan)
        return self._out(pick_rows(heads_THV.flatten(1), wanted_N))

    def attend(self, q_THQ: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """[T, H, V] of rotated, scaled queries over rows already in the cache."""
        heads_THV = q_THQ.new_empty(q_THQ.shape[0], *self._value_HCV.shape[::2])
        if plan.num_decodes:
            heads_THV[: plan.num_decodes] = self._decode(q_THQ[: plan.num_decodes], cache, plan)
        for chunk in plan.chunks:
            heads_THV[chunk.start : chunk.end] = self._prefill(q_THQ[chunk.start : chunk.end], cache, chunk)
        return heads_THV

    def _split_queries(self, down_q: torch.Tensor) -> torch.Tensor:
        if self._query is not None:
            norm, up = self._query
            down_q = up(norm(down_q))
        return down_q.unflatten(-1, (self._key_HNC.shape[0], -1))

    def _queries(self, down_q: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        q_THQ = self._split_queries(down_q)
        rotate_(q_THQ[..., self._config.qk_nope_head_dim :], rotations.unsqueeze(1))
        return q_THQ

    def _absorb(self, q_THQ: torch.Tensor) -> torch.Tensor:
        """Queries against cached rows: [T, H, C + R]."""
        nope, rank = self._config.qk_nope_head_dim, self._config.kv_lora_rank
        q = q_THQ.new_empty(*q_THQ.shape[:2], rank + self._config.qk_rope_head_dim)
        q[..., :rank] = torch.bmm(q_THQ[..., :nope].transpose(0, 1), self._key_HNC).transpose(0, 1)
        q[..., rank:] = q_THQ[..., nope:]
        return q

    def _decode(self, q_SHQ: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """[S, H, V]."""
        q_SHC = self._absorb(q_SHQ)
        rank = self._config.kv_lora_rank
        padded = plan.padded_decodes
        if padded is not None:
            rows_SLC = padded.rows(cache)
            scores_SHL = torch.bmm(q_SHC, rows_SLC.transpose(1, 2))
            if padded.bias_S1L is not None:
                scores_SHL += padded.bias_S1L
            latent_SHC = torch.bmm(torch.softmax(scores_SHL, dim=-1), rows_SLC[..., :rank])
        else:
            latent_SHC = q_SHC.new_empty(*q_SHC.shape[:2], rank)
            for q_HC, latent_HC, context in zip(q_SHC, latent_SHC, plan.decodes, strict=True):
                rows_LC = context.rows(cache)
                probs_HL = torch.softmax(torch.mm(q_HC, rows_LC.t()), dim=-1)
                torch.mm(probs_HL, rows_LC[:, :rank], out=latent_HC)
        return torch.bmm(latent_SHC.transpose(0, 1), self._value_HCV).transpose(0, 1)

    def _prefill(self, q_nHQ: torch.Tensor, cache: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """[n, H, V]."""
        rows_LC = chunk.context.rows(cache)
        if self._is_expanding_cheaper(q_nHQ.shape[0], rows_LC.shape[0]):
            k_HLQ, v_HLV = self._expand(rows_LC)
            return attend_causal(q_nHQ.transpose(0, 1).unsqueeze(1), k_HLQ, v_HLV).squeeze(1).transpose(0, 1)
        q_HnC = self._absorb(q_nHQ).transpose(0, 1)
        rows_1LC = rows_LC.unsqueeze(0)
        latent = attend_causal(q_HnC.unsqueeze(0), rows_1LC, rows_1LC[..., : self._config.kv_lora_rank])
        return torch.bmm(latent.squeeze(0), self._value_HCV).transpose(0, 1)

    def _expand(self, rows_LC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_heads, nope, rank = self._key_HNC.shape
        latent_HLC = rows_LC[:, :rank].expand(num_heads, -1, -1)
        k_HLQ = rows_LC.new_empty(num_heads, rows_LC.shape[0], nope + self._config.qk_rope_head_dim)
        k_HLQ[..., :nope] = torch.bmm(latent_HLC, self._key_HNC.transpose(1, 2))
        k_HLQ[..., nope:] = rows_LC[:, rank:]
        return k_HLQ, torch.bmm(latent_HLC, self._value_HCV)

    def _is_expanding_cheaper(self, num_queries: int, num_rows: int) -> bool:
        """By multiplications of one head."""
        c = self._config
        expansion = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        expanded_row = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
        latent_row = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        expanded = num_rows * expansion + num_queries * num_rows * expanded_row
        return expanded < num_queries * expansion + num_queries * num_rows * latent_row


def load_mla_attention(
    config: ModelConfig,
    mla: MlaConfig,
    weights: WeightSource,
    prefix: str,
    *,
    has_kernels: bool = False,
    make_linear: MakeLinear = Linear,
) -> MlaAttention:
    hidden, heads, rank = config.hidden_size, config.num_heads, mla.kv_lora_rank
    row_size, q_size = rank + mla.qk_rope_head_dim, heads * config.head_dim
    kv_down = weights.get(f"{prefix}.kv_a_proj_with_mqa.weight", (row_size, hidden))
    kv_bias = weights.get(f"{prefix}.kv_a_proj_with_mqa.bias", (row_size,)) if config.attention_bias else None
    down_weights, biases = [_interleave_key(config, mla, kv_down)], []
    if kv_bias is not None:
        biases = [_interleave_key(config, mla, kv_bias)]
    query = None
    if mla.q_lora_rank is None:
        q_weight = weights.get(f"{prefix}.q_proj.weight", (q_size, hidden))
        down_weights.append(_prepare_query(config, mla, q_weight))
        biases += [bias.new_zeros(q_size) for bias in biases]
    else:
        down_weights.append(weights.get(f"{prefix}.q_a_proj.weight", (mla.q_lora_rank, hidden)))
        biases += [weights.get(f"{prefix}.q_a_proj.bias", (mla.q_lora_rank,)) for _ in biases]
        q_weight = weights.get(f"{prefix}.q_b_proj.weight", (q_size, mla.q_lora_rank))
        query = (
            RmsNorm(weights.get(f"{prefix}.q_a_layernorm.weight", (mla.q_lora_rank,)), _LATENT_NORM_EPS),
            make_linear(_prepare_query(config, mla, q_weight), None),
        )
    out_weight = weights.get(f"{prefix}.o_proj.weight", (hidden, heads * mla.v_head_dim))
    out_bias = weights.get(f"{prefix}.o_proj.bias", (hidden,)) if config.attention_bias else None
    head_size = mla.qk_nope_head_dim + mla.v_head_dim
    expansion_KC = weights.get(f"{prefix}.kv_b_proj.weight", (heads * head_size, rank))
    expansion = _split_expansion(mla, expansion_KC.unflatten(0, (heads, head_size)))
    norm_weight = weights.get(f"{prefix}.kv_a_layernorm.weight", (rank,))
    attention = MlaAttention(
        mla,
        make_linear(torch.cat(down_weights), torch.cat(biases) if biases else None),
        query,
        RmsNorm(norm_weight, _LATENT_NORM_EPS),
        expansion,
        make_linear(out_weight, out_bias),
    )
    if has_kernels:
        inverse_freq_R = inverse_frequencies(config.rope, mla.qk_rope_head_dim).to(norm_weight.device)
        task = RowTask(norm_weight, _LATENT_NORM_EPS, inverse_freq_R, attention_factor(config.rope))
        attention.kernels = MlaKernels(mla, task, expansion, expansion_KC)
    return attention


def _split_expansion(mla: MlaConfig, by_head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nope = mla.qk_nope_head_dim
    return by_head[:, :nope].contiguous(), by_head[:, nope:].transpose(1, 2).contiguous()


def _interleave_key(config: ModelConfig, mla: MlaConfig, weight: torch.Tensor) -> torch.Tensor:
    if config.rope.interleave:
        return weight
    rank = mla.kv_lora_rank
    return torch.cat((weight[:rank], interleave_rows(weight[rank:])))


def _prepare_query(config: ModelConfig, mla: MlaConfig, weight: torch.Tensor) -> torch.Tensor:
    """Rope rows interleaved, softmax scale folded in: head_dim ** -0.5, times the square of YaRN's magnitude
    where mscale_all_dim asks for it."""
    scale = config.head_dim**-0.5
    if config.rope.scaling != "none" and config.rope.mscale_all_dim:
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    if not config.rope.interleave:
        heads = weight.unflatten(0, (config.num_heads, config.head_dim)).unbind()
        nope = mla.qk_nope_head_dim
        weight = torch.cat([part for head in heads for part in (head[:nope], interleave_rows(head[nope:]))])
    return weight * scale
