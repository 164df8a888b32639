# ruff: noqa: PLR0913, PLR0915, C901 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The expert products of the few tokens of a small decode step without matrix units: each program reads a few
whole rows of an expert's weight at once. Those of the shared experts, which every token needs, are on their
way before the gate has chosen.

T tokens, K experts a token (with shared ones), P = T * K pairs, D hidden, I intermediate, E routed experts, S
shared experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.few_rows import FewRowsTile
from engine.kernels.moe_choice import Route
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gemm import ExpertWeights
from engine.kernels.step_switches import SWITCHES

MAX_TOKENS = 4
_MAX_DEPTH = 4096  # inputs that a program holds at a time


def multiply_up_gate_few(
    x_TD: torch.Tensor, weights: ExpertWeights, route: Route, spec: GateSpec, tile: FewRowsTile
) -> torch.Tensor:
    """[P, I] in the order of sorted pairs."""
    num_tokens = x_TD.shape[0]
    out = x_TD.new_empty(num_tokens * spec.experts_per_token, weights.down.shape[2])
    _launch(x_TD, weights.up_gate, out, route, spec, num_tokens, tile, is_gated=True)
    return out


def multiply_down_few(
    h_PI: torch.Tensor, weights: ExpertWeights, route: Route, spec: GateSpec, tile: FewRowsTile
) -> torch.Tensor:
    """[P, D], pair p in row p; h in the order of sorted pairs."""
    num_tokens = h_PI.shape[0] // spec.experts_per_token
    out = h_PI.new_empty(h_PI.shape[0], weights.down.shape[1])
    _launch(h_PI, weights.down, out, route, spec, num_tokens, tile, is_gated=False)
    return out


def sum_down_one(
    h_PI: torch.Tensor,
    weights: ExpertWeights,
    weights_TK: torch.Tensor,
    route: Route,
    spec: GateSpec,
    num_warps: int,
) -> torch.Tensor:
    """[1, D] of one token: the weighted sum of what its experts make of it, rounded once."""
    num_out, depth = weights.down.shape[1:]
    assert weights_TK.shape[0] == 1 and h_PI.is_contiguous() and weights.down.is_contiguous()
    out = h_PI.new_empty(1, num_out)
    _sum_down_kernel[(num_out,)](
        h_PI,
        weights.down,
        weights_TK,
        out,
        route.sorted_pairs_P,
        route.tile_expert_M,
        num_out,
        depth,
        E=spec.num_experts,
        SHARED=spec.num_shared,
        SHARED_PAD=triton.next_power_of_2(max(1, spec.num_shared)),
        TOP_K=spec.top_k,
        TOP_K_PAD=triton.next_power_of_2(spec.top_k),
        BLOCK=triton.next_power_of_2(depth),
        IS_EARLY=SWITCHES.early_shared,
        num_warps=num_warps,
        **launch_options(1),
    )
    return out


def _launch(
    x: torch.Tensor,
    w_ENK: torch.Tensor,
    out: torch.Tensor,
    route: Route,
    spec: GateSpec,
    num_tokens: int,
    tile: FewRowsTile,
    *,
    is_gated: bool,
) -> None:
    assert num_tokens <= MAX_TOKENS and x.is_contiguous() and w_ENK.is_contiguous()
    num_experts = spec.num_shared + min(num_tokens * spec.top_k, spec.num_experts)
    depth = w_ENK.shape[2]
    _few_experts_kernel[(triton.cdiv(out.shape[1], tile.outputs), num_experts)](
        x,
        w_ENK,
        out,
        route.sorted_pairs_P,
        route.tile_expert_M,
        route.tile_start_M,
        route.tile_end_M,
        out.shape[1],
        depth,
        IS_GATED=is_gated,
        TOKENS=num_tokens,
        TOKENS_PAD=triton.next_power_of_2(num_tokens),
        E=spec.num_experts,
        SHARED=spec.num_shared,
        TOP_K=spec.top_k,
        OUTPUTS=tile.outputs,
        BLOCK=min(_MAX_DEPTH, triton.next_power_of_2(depth)),
        IS_EARLY=SWITCHES.early_shared,
        num_warps=tile.num_warps,
        **launch_options(num_tokens),
    )


@triton.jit
def _few_experts_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    pairs_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_out,
    depth,
    IS_GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """w [experts, num_out, depth], or twice as many rows if gated: first up's, then gate's."""
    signal(DEPENDENT)
    if not IS_EARLY:
        wait(DEPENDENT)
    m = tl.program_id(1)
    # A shared expert has its pairs last, token by token.
    expert = E + m
    start = TOKENS * (TOP_K + m)
    end = start + TOKENS
    if m >= SHARED:
        wait(DEPENDENT)
        expert = tl.load(tile_expert_ptr + m - SHARED)
        start = tl.load(tile_start_ptr + m - SHARED)
        end = tl.load(tile_end_ptr + m - SHARED)
        if expert >= E:
            end = start
    if start >= end:
        return
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_out
    ks = tl.arange(0, BLOCK)
    rows = tl.arange(0, TOKENS_PAD)
    w_rows = num_out * 2 if IS_GATED else num_out
    place = (expert.to(tl.int64) * w_rows + outputs)[:, None] * depth + ks[None, :]
    total = tl.zeros((OUTPUTS, TOKENS_PAD), tl.float32)
    total_gate = tl.zeros((OUTPUTS, TOKENS_PAD), tl.float32)
    for k in range(0, depth, BLOCK):
        is_k = ks < depth - k
        mask = is_output[:, None] & is_k[None, :]
        w = tl.load(w_ptr + place + k, mask=mask, other=0.0)
        if IS_GATED:
            gate = tl.load(w_ptr + num_out.to(tl.int64) * depth + place + k, mask=mask, other=0.0)
        wait(DEPENDENT)
        w = w.to(tl.float32)
        if IS_GATED:
            gate = gate.to(tl.float32)
        for t in tl.static_range(TOKENS):
            row = tl.minimum(start + t, end - 1)  # past the last: again, and not stored
            if IS_GATED:
                row = tl.load(pairs_ptr + row) // (TOP_K + SHARED)
            x = tl.load(x_ptr + row.to(tl.int64) * depth + k + ks, mask=is_k, other=0.0).to(tl.float32)
            part = tl.sum(w * x[None, :], 1)
            total += tl.where(rows[None, :] == t, part[:, None], 0.0)
            if IS_GATED:
                part = tl.sum(gate * x[None, :], 1)
                total_gate += tl.where(rows[None, :] == t, part[:, None], 0.0)
    is_row = start + rows < end
    if IS_GATED:
        total = total * total_gate / (1.0 + tl.exp(-total_gate))
        out_rows = start + rows
    else:
        out_rows = tl.load(pairs_ptr + start + rows, mask=is_row, other=0)
    place = out_rows[None, :].to(tl.int64) * num_out + outputs[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & is_output[:, None])


@triton.jit
def _sum_down_kernel(
    h_ptr,
    w_ptr,
    weights_ptr,
    out_ptr,
    pairs_ptr,
    tile_expert_ptr,
    num_out,
    depth,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One output: a row of each expert's weight. The one token's tile j is its sorted pair j."""
    signal(DEPENDENT)
    if not IS_EARLY:
        wait(DEPENDENT)
    output = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK)
    is_k = (ks < depth)[None, :]
    shared = tl.arange(0, SHARED_PAD)
    is_shared = (shared < SHARED)[:, None] & is_k
    shared_w = tl.load(
        w_ptr + ((E + shared)[:, None] * num_out + output) * depth + ks[None, :], mask=is_shared, other=0.0
    )
    wait(DEPENDENT)
    tiles = tl.arange(0, TOP_K_PAD)
    is_tile = tiles < TOP_K
    is_routed = is_tile[:, None] & is_k
    experts = tl.load(tile_expert_ptr + tiles, mask=is_tile, other=0)
    w = tl.load(
        w_ptr + (experts[:, None] * num_out + output) * depth + ks[None, :], mask=is_routed, other=0.0
    )
    pairs = tl.load(pairs_ptr + tiles, mask=is_tile, other=0)
    weights = tl.load(weights_ptr + pairs, mask=is_tile, other=0.0)
    h = tl.load(h_ptr + tiles[:, None] * depth + ks[None, :], mask=is_routed, other=0.0).to(tl.float32)
    shared_h = tl.load(h_ptr + (TOP_K + shared)[:, None] * depth + ks[None, :], mask=is_shared, other=0.0)
    total = tl.sum(shared_w.to(tl.float32) * shared_h.to(tl.float32), 0)
    total += tl.sum(w.to(tl.float32) * h * weights[:, None], 0)
    tl.store(out_ptr + output, tl.sum(total, 0).to(out_ptr.dtype.element_ty))
