"""What the chosen experts make of their tokens, in kernels: sort, two grouped products, weighted sum.

T tokens, D hidden, P pairs of token and expert.
"""

from __future__ import annotations

import torch

from engine.checkpoint import fp8
from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.fp8_quantise import quantise_rows
from engine.kernels.moe_choice import Choice, Route
from engine.kernels.moe_combine import combine_pairs
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gemm import ExpertWeights, multiply_down, multiply_up_gate
from engine.kernels.moe_one_token import multiply_down_one, multiply_up_gate_one
from engine.kernels.moe_route import max_tiles, route_pairs
from engine.kernels.moe_tiles import ExpertTiles, MoeTiles, OneTokenTiles, SpecialisedTiles


def run_experts(
    x_TD: torch.Tensor,
    choice: Choice,
    spec: GateSpec,
    weights: ExpertWeights,
    tiles: ExpertTiles,
) -> torch.Tensor:
    return combine_pairs(multiply_experts(x_TD, choice, spec, weights, tiles), choice.weights_TK)


def multiply_experts(
    x_TD: torch.Tensor,
    choice: Choice,
    spec: GateSpec,
    weights: ExpertWeights,
    tiles: ExpertTiles,
) -> torch.Tensor:
    """[T * K, D]: what each chosen expert makes of its token."""
    if isinstance(tiles, OneTokenTiles):
        h_KI = multiply_up_gate_one(x_TD, weights, choice.ids_TK, spec, tiles.up_gate)
        return multiply_down_one(h_KI, weights, choice.ids_TK, spec, tiles.down)
    num_tokens = x_TD.shape[0]
    route = choice.route
    if route is None or route.tile_rows != tiles.rows:
        num_tiles = max_tiles(num_tokens, spec.top_k, spec.num_shared, spec.num_experts, tiles.rows)
        route = route_pairs(choice, num_tiles, tiles.rows)
    if isinstance(tiles, SpecialisedTiles):
        from engine.kernels.moe_specialised import run_products_specialised  # not in every Triton

        return run_products_specialised(x_TD, route, spec, weights)
    return _run_products(x_TD, route, spec, weights, tiles)


def _run_products(
    x_TD: torch.Tensor, route: Route, spec: GateSpec, weights: ExpertWeights, tiles: MoeTiles
) -> torch.Tensor:
    """[P, D], pair p in row p."""
    is_before = weights.is_fp8 and not tiles.quantises_inside
    quantises_h = weights.is_fp8 and tiles.quantises_h
    x = quantise_rows(x_TD) if is_before else x_TD
    h = multiply_up_gate(x, weights, route, spec.experts_per_token, tiles.up_gate, quantises_out=quantises_h)
    if is_before and isinstance(h, torch.Tensor):
        h = quantise_rows(h)
    return multiply_down(h, weights, route, tiles.down)


def run_experts_reference(
    x_TD: torch.Tensor, choice: Choice, spec: GateSpec, weights: ExpertWeights
) -> torch.Tensor:
    """float32, expert by expert."""
    up_gate, down = _dense(weights.up_gate, weights.up_gate_scale), _dense(weights.down, weights.down_scale)
    x = x_TD.float()
    out_TD = torch.zeros_like(x)
    for expert in range(spec.num_all_experts):
        tokens, places = (choice.ids_TK == expert).nonzero(as_tuple=True)
        up, gate = (x[tokens] @ up_gate[expert].t()).chunk(2, dim=1)
        y = (up * torch.nn.functional.silu(gate)) @ down[expert].t()
        out_TD.index_add_(0, tokens, y * choice.weights_TK[tokens, places].unsqueeze(1))
    return out_TD


def _dense(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        return values.float()
    block = (FP8_GROUP, FP8_GROUP)
    pairs = zip(values, scales, strict=True)
    return torch.stack([fp8.dequantise(value, scale, block, torch.float32) for value, scale in pairs])
