"""The demo model as it is trained: DeepSeek-V3's architecture (arXiv:2412.19437), the hub's parameter names.

Every expert is computed for every token and weighted by its gate, zero for those that were not chosen: at
this size two large products beat any dispatch, and the result is that of sparse experts.

B rows, T tokens, D hidden, H heads, E experts, F hidden size of an expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    vocab_size: int = 16384
    hidden_size: int = 384
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    intermediate_size: int = 1024
    moe_intermediate_size: int = 128
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 6
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def hub(self) -> dict[str, Any]:
        """config.json in the hub's spelling, with every field that some loader insists on."""
        return asdict(self) | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "torch_dtype": "bfloat16",
            "num_key_value_heads": self.num_attention_heads,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "rope_scaling": None,
            "rope_interleave": True,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "num_nextn_predict_layers": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """MLA in its expanded form."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        size, heads = config.hidden_size, config.num_attention_heads
        qk_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RmsNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * qk_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, config.rms_norm_eps)
        kv_dim = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * kv_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, size, bias=False)

    def forward(self, x_BTD: torch.Tensor, angles_T2: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        config = self.config
        rows, tokens, _ = x_BTD.shape
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))).view(rows, tokens, heads, -1)
        q_nope, q_rope = q.split([nope, config.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(rows, tokens, heads, -1)
        k_nope, v = kv.split([nope, config.v_head_dim], dim=-1)
        k_rope = rotated(k_rope[:, :, None], angles_T2).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, rotated(q_rope, angles_T2)], dim=-1).transpose(1, 2)
        k = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """`load_E` counts the tokens that chose each expert since it was last read."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        experts, size, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_weight_ED = nn.Parameter(torch.empty(experts, size))
        self.gate_proj_EFD = nn.Parameter(torch.empty(experts, inner, size))
        self.up_proj_EFD = nn.Parameter(torch.empty(experts, inner, size))
        self.down_proj_EDF = nn.Parameter(torch.empty(experts, size, inner))
        self.shared_experts = Mlp(size, inner * config.n_shared_experts)
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts))
        self.bias_E: torch.Tensor
        self.load_E: torch.Tensor

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        experts = len(self.bias_E)
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = F.linear(x_BTD.float(), self.gate_weight_ED.float()).sigmoid()
        chosen = (scores.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
        is_chosen = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        if self.training:
            self.load_E += is_chosen.detach().sum(dim=(0, 1))
        weights = scores * is_chosen
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling
        gate = F.linear(x_BTD, self.gate_proj_EFD.flatten(0, 1))
        up = F.linear(x_BTD, self.up_proj_EFD.flatten(0, 1))
        inner = (F.silu(gate) * up).unflatten(-1, (experts, -1)) * weights[..., None].to(gate.dtype)
        down = self.down_proj_EDF.transpose(0, 1).flatten(1, 2)
        return F.linear(inner.flatten(-2), down) + self.shared_experts(x_BTD)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """A step towards equal loads without an auxiliary loss (Wang et al., arXiv:2408.15664)."""
        self.bias_E += speed * (self.load_E.mean() - self.load_E).sign()
        self.load_E.zero_()


class Layer(nn.Module):
    def __init__(self, config: StudentConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        is_dense = index < config.first_k_dense_replace
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if is_dense else Experts(config)

    def forward(self, x_BTD: torch.Tensor, angles_T2: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), angles_T2)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class NextTokenLayer(Layer):
    """DeepSeek-V3's MTP module: from the hidden state of token i and token i + 1 to token i + 2."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.head_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def draft(
        self, embedded_BTD: torch.Tensor, hidden_BTD: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1))
        return self.head_norm(self(x, angles))


class Student(nn.Module):
    def __init__(self, config: StudentConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = NextTokenLayer(config)
        self._init(seed)

    @torch.no_grad()
    def _init(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        residual = (2 * len(self.layers)) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            is_out = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj_EDF"))
            deviation = (
                0.02 if "embed" in name else parameter.shape[-1] ** -0.5 * (residual if is_out else 1.0)
            )
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)

    def moe_layers(self) -> list[Experts]:
        return [layer.mlp for layer in [*self.layers, self.mtp] if isinstance(layer.mlp, Experts)]

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, D], normed: what the head and the MTP layer read."""
        angles = rope_angles(tokens_BT.shape[1], self.config, tokens_BT.device)
        x = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)

    def losses(
        self, tokens_BT: torch.Tensor, is_target_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy in nats of the next token and, by the MTP layer, of the one after it, over the
        tokens where `is_target` is set."""
        hidden = self.hidden(tokens_BT)
        main = self._loss(hidden[:, :-1], tokens_BT[:, 1:], is_target_BT[:, 1:])
        angles = rope_angles(tokens_BT.shape[1] - 1, self.config, tokens_BT.device)
        drafted = self.mtp.draft(self.embed_tokens(tokens_BT[:, 1:]), hidden[:, :-1], angles)
        second = self._loss(drafted[:, :-1], tokens_BT[:, 2:], is_target_BT[:, 2:])
        return main, second

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weights = is_target.flatten().float()
        return (losses * weights).sum() / weights.sum().clamp(min=1)


def rope_angles(
    tokens: int, config: StudentConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T, R / 2] of float32."""
    dims = torch.arange(0, config.qk_rope_head_dim, 2, device=device, dtype=torch.float32)
    inverse = config.rope_theta ** (-dims / config.qk_rope_head_dim)
    angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotated(x_BTHR: torch.Tensor, angles_T2: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Interleaved pairs, each turned by its frequency."""
    cos, sin = (part[None, :, None].to(x_BTHR.dtype) for part in angles_T2)
    even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
