"""The teacher, a llama checkpoint, sampling from many prompts at once on one device.

Each of S slots is at its own place of its own sequence: it takes the next token of its prompt while there is
one and samples otherwise, and turns to the next prompt when it has ended. A step has no branch that depends
on a value, so on CUDA all of it is one graph, and the host looks at nothing but whether prompts are left.

S slots, N prompts, P longest prompt, G most tokens generated, L = P + G, V vocabulary, K heads of keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tools.demo_model.slot_attention import slot_attention

_END = 2  # <|im_end|>
_STEPS_BETWEEN_LOOKS = 32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Teacher:
    """Weights of a llama checkpoint with tied embeddings, on one device in bfloat16 (CUDA) or float32."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["hidden_size"] // self.num_heads
        self.eps: float = config["rms_norm_eps"]
        rope = config.get("rope_parameters") or config
        self.theta: float = rope["rope_theta"]
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = {
            name: tensor.to(device, self.dtype)
            for path in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = [_layer(weights, i) for i in range(config["num_hidden_layers"])]

    def angles(self, positions_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dims = torch.arange(0, self.head_dim, 2, device=self.device, dtype=torch.float32)
        angles = positions_S[:, None].float() * self.theta ** (-dims / self.head_dim)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    num_slots: int
    max_new_tokens: int
    temperature: float
    min_p: float  # tokens below this share of the likeliest one's probability are never taken


class SlotSampler:
    """One run over a list of prompts. Tokens that all of them begin with are computed once in each slot."""

    def __init__(self, teacher: Teacher, prompts: list[list[int]], plan: SamplingPlan) -> None:
        self._teacher, self._plan = teacher, plan
        device = teacher.device
        self._count = len(prompts)
        longest = max(map(len, prompts))
        self._limit = longest + plan.max_new_tokens
        # One more row, for the slots that have nothing left to do.
        rows = [prompt + [0] * (longest - len(prompt)) for prompt in (*prompts, prompts[0])]
        self._prompts_NP = torch.tensor(rows, dtype=torch.int32, device=device)
        self._lengths_N = torch.tensor([*map(len, prompts), len(prompts[0])], device=device)
        self._out_NG = torch.full(
            (self._count + 1, plan.max_new_tokens), -1, dtype=torch.int32, device=device
        )
        slots = plan.num_slots
        self._index_S = torch.arange(slots, device=device).clamp(max=self._count)
        self._next = torch.tensor(min(slots, self._count), device=device)
        self._position_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._num_common = _common_prefix(prompts)
        self._token_S = self._prompts_NP[self._index_S, 0].long()
        shape = (len(teacher.layers), 2, slots, teacher.num_kv_heads, self._limit, teacher.head_dim)
        self._cache = torch.zeros(shape, dtype=teacher.dtype, device=device)
        self._before, self._after, self._choose = _compiled(device)

    def run(self, may_go_on: Callable[[], bool]) -> torch.Tensor:
        """int32 [N, G] on the CPU: what was generated, the ending token included if it came, then -1.
        Until no prompt is left, or `may_go_on` says no: answers without an end then stay as they are."""
        step = self._captured() if self._teacher.device.type == "cuda" else self._step
        with torch.inference_mode():
            while bool((self._index_S < self._count).any()) and may_go_on():
                for _ in range(_STEPS_BETWEEN_LOOKS):
                    step()
        return self._out_NG[: self._count].cpu()

    def _captured(self) -> Callable[[], None]:
        with torch.inference_mode():
            for _ in range(3):  # they count as steps: compiling leaves no other trace
                self._step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        return graph.replay

    def _step(self) -> None:
        teacher = self._teacher
        x = teacher.embedding_VD[self._token_S]
        cos, sin = teacher.angles(self._position_S)
        for i, layer in enumerate(teacher.layers):
            q, k, v = self._before(x, layer, cos, sin, (teacher.num_heads, teacher.num_kv_heads, teacher.eps))
            heads = slot_attention(q, k, v, self._cache[i], self._position_S)
            x = self._after(x, heads, layer, teacher.eps)
        logits = F.linear(F.rms_norm(x, x.shape[-1:], teacher.norm, teacher.eps), teacher.embedding_VD)
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        self._advance(self._choose(logits, noise, self._plan.temperature, self._plan.min_p))

    def _advance(self, sampled_S: torch.Tensor) -> None:
        place_S = self._position_S + 1
        lengths_S = self._lengths_N[self._index_S]
        is_prompt_S = place_S < lengths_S
        longest = self._prompts_NP.shape[1]
        given_S = self._prompts_NP[self._index_S, place_S.clamp(max=longest - 1)].long()
        token_S = torch.where(is_prompt_S, given_S, sampled_S)
        generated_S = place_S - lengths_S
        row_S = torch.where(is_prompt_S, self._count, self._index_S)
        self._out_NG[row_S, generated_S.clamp(0, self._plan.max_new_tokens - 1)] = token_S.int()
        is_last_S = (token_S == _END) | (generated_S + 1 >= self._plan.max_new_tokens)
        is_done_S = ~is_prompt_S & is_last_S & (self._index_S < self._count)
        order_S = self._next + is_done_S.cumsum(0) - 1
        self._next += is_done_S.sum()
        self._index_S.copy_(torch.where(is_done_S, order_S, self._index_S).clamp(max=self._count))
        # A slot without work repeats one place, so that it costs next to no attention.
        starts_S = is_done_S | (self._index_S >= self._count)
        first_S = self._prompts_NP[self._index_S, self._num_common].long()
        self._token_S.copy_(torch.where(starts_S, first_S, token_S))
        self._position_S.copy_(torch.where(starts_S, self._num_common, place_S))


def _common_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, less than the shortest has."""
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(shared, min(map(len, prompts)) - 1)


def _before(
    x: torch.Tensor,
    layer: LayerWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sizes: tuple[int, int, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, kv_heads, eps = sizes
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], layer.attention_norm, eps), layer.qkv)
    qkv = qkv.view(len(x), heads + 2 * kv_heads, -1)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return _turned(q, cos, sin), _turned(k, cos, sin), v.contiguous()


def _turned(x_SHC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_SHC.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _after(x: torch.Tensor, heads: torch.Tensor, layer: LayerWeights, eps: float) -> torch.Tensor:
    x = x + F.linear(heads.flatten(1), layer.out)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps), layer.gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def _choose(logits: torch.Tensor, noise: torch.Tensor, temperature: float, min_p: float) -> torch.Tensor:
    """The token with the largest probability over an exponential draw is a sample (the Gumbel-max trick)."""
    scaled = logits.float() / temperature
    shares = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    return (torch.where(shares >= min_p, shares, 0.0) / noise).argmax(dim=-1)


def _compiled(device: torch.device):  # type: ignore[no-untyped-def]
    if device.type != "cuda":
        return _before, _after, _choose
    return tuple(torch.compile(piece, dynamic=False) for piece in (_before, _after, _choose))


def _layer(weights: dict[str, torch.Tensor], index: int) -> LayerWeights:
    def of(name: str) -> torch.Tensor:
        return weights[f"model.layers.{index}.{name}.weight"]

    return LayerWeights(
        attention_norm=of("input_layernorm"),
        qkv=torch.cat([of(f"self_attn.{name}_proj") for name in "qkv"]),
        out=of("self_attn.o_proj"),
        mlp_norm=of("post_attention_layernorm"),
        gate_up=torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")]),
        down=of("mlp.down_proj"),
    )
