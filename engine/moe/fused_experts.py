"""A layer of experts on one CUDA device: gate, sort, two grouped products, weighted sum. Nothing in it waits
for the device or depends on what the tokens chose, so it can be part of a CUDA graph.

The shared experts are experts that every token goes to, with weight 1: their product is part of the same
launches. T tokens, D hidden, I intermediate, E routed experts, S shared experts.
"""

from __future__ import annotations

from copy import copy
from typing import Self

import torch

from engine.checkpoint import fp8
from engine.checkpoint.fp8 import FP8_GROUP
from engine.checkpoint.model_config import MoeConfig
from engine.checkpoint.weights import WeightSource
from engine.kernels.moe_combine import combine_into_norm_
from engine.kernels.moe_gate import GateSpec, choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_gemm import ExpertWeights
from engine.kernels.moe_tiles import ExpertTiles, moe_tiles
from engine.layers.mlp import load_up_gate
from engine.layers.rms_norm import RmsNorm
from engine.moe.expert_products import multiply_experts, run_experts
from engine.moe.specialised import can_specialise


class FusedMoeLayer:
    """What MoeLayer computes when all experts are local, in kernels. Its calls follow each other on one
    stream."""

    def __init__(
        self,
        spec: GateSpec,
        gate_ED: torch.Tensor,
        bias_E: torch.Tensor | None,
        weights: ExpertWeights,
        dtype: torch.dtype,
    ) -> None:
        """gate and bias are float32; the experts of `weights` are the routed ones, then the shared. dtype is
        that of the tokens."""
        self._spec = spec
        self._gate_PED = split_weight(gate_ED, dtype)
        self._bias_E = bias_E
        self._weights = weights
        self._is_specialised = can_specialise(weights, dtype)
        self._state = new_gate_state(spec.num_experts, gate_ED.device)

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        num_tokens = x_TD.shape[0]
        if num_tokens == 0:
            return torch.empty_like(x_TD)
        choice = choose_experts_fused(x_TD, self._gate_PED, self._bias_E, self._spec, self._state)
        return run_experts(x_TD, choice, self._spec, self._weights, self._tiles(num_tokens))

    def between_norms(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor, norm: RmsNorm, next_norm: RmsNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta + this layer of norm(x + delta), and next_norm of that. x changes in place."""
        num_tokens, spec = x_TD.shape[0], self._spec
        if num_tokens == 0:
            return x_TD, torch.empty_like(x_TD)
        normed_TD = norm.add_(x_TD, delta_TD)
        choice = choose_experts_fused(normed_TD, self._gate_PED, self._bias_E, spec, self._state)
        y_PD = multiply_experts(normed_TD, choice, spec, self._weights, self._tiles(num_tokens))
        return x_TD, combine_into_norm_(y_PD, choice.weights_TK, x_TD, next_norm.weight_D, next_norm.eps)

    def _tiles(self, num_tokens: int) -> ExpertTiles:
        return moe_tiles(num_tokens, self._weights.up_gate.dtype, is_specialised=self._is_specialised)

    def take_load(self) -> torch.Tensor:
        """int64 [E] on the device: tokens by logical expert since the last call. Waits for nothing."""
        load_E = self._state.load_E.clone()
        self._state.load_E.zero_()
        return load_E

    def uncounted(self) -> Self:
        """The same layer, whose tokens count nowhere."""
        other = copy(self)
        other._state = new_gate_state(self._spec.num_experts, self._state.load_E.device)
        return other


def gate_spec(config: MoeConfig) -> GateSpec:
    is_limited = config.topk_method != "greedy" and config.topk_groups < config.num_groups
    group_size = config.num_routed_experts // config.num_groups
    return GateSpec(
        num_experts=config.num_routed_experts,
        num_shared=config.num_shared_experts,
        top_k=config.num_experts_per_token,
        is_sigmoid=config.scoring == "sigmoid",
        num_groups=config.num_groups if is_limited else 1,
        topk_groups=config.topk_groups if is_limited else 1,
        is_group_of_two=config.topk_method == "noaux_tc" and group_size > 1,
        norm_weights=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
    )


def load_fused_moe(
    config: MoeConfig, weights: WeightSource, prefix: str, hidden_size: int, *, is_fp8: bool
) -> FusedMoeLayer:
    """One expert at a time: beside the layer only one expert's weights are in memory twice."""
    spec = gate_spec(config)
    gate_ED = weights.get(f"{prefix}.gate.weight", (spec.num_experts, hidden_size), torch.float32)
    bias_E = None
    if config.topk_method == "noaux_tc":
        bias_E = weights.get(f"{prefix}.gate.e_score_correction_bias", (spec.num_experts,), torch.float32)
    stack = _Stack(spec.num_all_experts, hidden_size, config.moe_intermediate_size, is_fp8)
    for expert in range(spec.num_experts):
        up_gate, down = _load_expert(weights, f"{prefix}.experts.{expert}", hidden_size, stack.size)
        dtype = up_gate.dtype
        stack.put(expert, up_gate, down)
    if spec.num_shared:
        size = spec.num_shared * stack.size
        up_gate, down = _load_expert(weights, f"{prefix}.shared_experts", hidden_size, size)
        up, gate = up_gate.chunk(2)
        for s in range(spec.num_shared):
            part = slice(s * stack.size, (s + 1) * stack.size)
            stack.put(spec.num_experts + s, torch.cat((up[part], gate[part])), down[:, part])
    return FusedMoeLayer(spec, gate_ED, bias_E, stack.weights(), dtype)


def _load_expert(
    weights: WeightSource, name: str, hidden_size: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    down = weights.get(f"{name}.down_proj.weight", (hidden_size, size))
    return load_up_gate(weights, name, hidden_size, size), down


class _Stack:
    """The weights of all experts of a layer, filled one by one."""

    def __init__(self, num_experts: int, hidden_size: int, size: int, is_fp8: bool) -> None:
        self.size = size
        self._num_experts = num_experts
        self._shapes = ((2 * size, hidden_size), (hidden_size, size))
        self._is_fp8 = is_fp8
        self._values: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []

    def put(self, expert: int, up_gate: torch.Tensor, down: torch.Tensor) -> None:
        if not self._values:
            self._allocate(up_gate)
        for i, weight in enumerate((up_gate, down)):
            if self._is_fp8:
                value, scale = fp8.quantise(weight, (FP8_GROUP, FP8_GROUP))
                self._values[i][expert], self._scales[i][expert] = value, scale
            else:
                self._values[i][expert] = weight

    def weights(self) -> ExpertWeights:
        scales = self._scales if self._is_fp8 else (None, None)
        return ExpertWeights(self._values[0], self._values[1], scales[0], scales[1])

    def _allocate(self, like: torch.Tensor) -> None:
        dtype = torch.float8_e4m3fn if self._is_fp8 else like.dtype
        for shape in self._shapes:
            size = (self._num_experts, *shape)
            self._values.append(torch.empty(size, dtype=dtype, device=like.device))
            if self._is_fp8:
                blocks = fp8.num_blocks(shape, (FP8_GROUP, FP8_GROUP))
                scales = torch.empty(self._num_experts, *blocks, dtype=torch.float32, device=like.device)
                self._scales.append(scales)
