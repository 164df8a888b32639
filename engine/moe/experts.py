from __future__ import annotations

import torch

from engine.checkpoint.model_config import MoeConfig
from engine.checkpoint.weights import WeightSource
from engine.layers.linear import Linear
from engine.layers.mlp import gated_silu, load_up_gate


class Experts:
    """The gated MLPs of this rank's experts, computed expert by expert over rows sorted by expert."""

    def __init__(self, up_gates: list[Linear], downs: list[Linear], intermediate_size: int) -> None:
        self._up_gates = up_gates
        self._downs = downs
        self._intermediate_size = intermediate_size

    def __call__(self, x_RD: torch.Tensor, num_tokens_per_expert: list[int]) -> torch.Tensor:
        up_gate_RI = x_RD.new_empty(x_RD.shape[0], 2 * self._intermediate_size)
        _multiply_groups(up_gate_RI, x_RD, self._up_gates, num_tokens_per_expert)
        y_RD = torch.empty_like(x_RD)
        _multiply_groups(y_RD, gated_silu(up_gate_RI), self._downs, num_tokens_per_expert)
        return y_RD


def _multiply_groups(out: torch.Tensor, x: torch.Tensor, linears: list[Linear], num_rows: list[int]) -> None:
    groups = zip(linears, out.split(num_rows), x.split(num_rows), num_rows, strict=True)
    for linear, out_group, x_group, num in groups:
        if num:
            linear.into(out_group, x_group)


def load_experts(
    config: MoeConfig, weights: WeightSource, prefix: str, hidden_size: int, expert_ids: range
) -> Experts:
    """Only the experts of this rank are read."""
    size = config.moe_intermediate_size
    names = [f"{prefix}.{expert_id}" for expert_id in expert_ids]
    up_gates = [Linear(load_up_gate(weights, name, hidden_size, size)) for name in names]
    downs = [Linear(weights.get(f"{name}.down_proj.weight", (hidden_size, size))) for name in names]
    return Experts(up_gates, downs, size)
