from __future__ import annotations

import torch
from torch.nn import functional

from engine.checkpoint.weights import WeightSource
from engine.kernels.support import has_kernels
from engine.layers.fp8_linear import Fp8Linear, MakeLinear
from engine.layers.linear import Linear


class GatedMlp:
    """down(silu(gate(x)) * up(x)); up and gate are one product."""

    def __init__(self, up_gate: Linear | Fp8Linear, down: Linear | Fp8Linear) -> None:
        self._up_gate = up_gate
        self._down = down

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._down(gated_silu(self._up_gate(x_TD)))


def gated_silu(up_gate: torch.Tensor) -> torch.Tensor:
    """[..., up | gate] -> up * gate * sigmoid(gate)."""
    if up_gate.dim() == 2 and has_kernels(up_gate.device):
        from engine.kernels.gated_silu import gated_silu_rows  # needs Triton

        return gated_silu_rows(up_gate)
    return functional.glu(up_gate).mul_(up_gate[..., up_gate.shape[-1] // 2 :])


def load_up_gate(
    weights: WeightSource, prefix: str, hidden_size: int, intermediate_size: int
) -> torch.Tensor:
    """[2 * I, D] in the order that `gated_silu` reads."""
    shape = (intermediate_size, hidden_size)
    up = weights.get(f"{prefix}.up_proj.weight", shape)
    return torch.cat((up, weights.get(f"{prefix}.gate_proj.weight", shape)))


def load_gated_mlp(
    weights: WeightSource,
    prefix: str,
    hidden_size: int,
    intermediate_size: int,
    has_bias: bool,
    make_linear: MakeLinear = Linear,
) -> GatedMlp:
    up_gate_bias = down_bias = None
    if has_bias:
        biases = [weights.get(f"{prefix}.{name}_proj.bias", (intermediate_size,)) for name in ("up", "gate")]
        up_gate_bias = torch.cat(biases)
        down_bias = weights.get(f"{prefix}.down_proj.bias", (hidden_size,))
    down = weights.get(f"{prefix}.down_proj.weight", (hidden_size, intermediate_size))
    up_gate = load_up_gate(weights, prefix, hidden_size, intermediate_size)
    return GatedMlp(make_linear(up_gate, up_gate_bias), make_linear(down, down_bias))
