# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The gate of one or two tokens in one kernel with the residual sum and the norm before it.

So small a step waits here for one thing after another while the memory rests. So each program takes a few
experts, whose weights it has read before the token is there; it norms the token by itself; the last one to
arrive chooses, by counting for each expert those that are better.

T tokens, D hidden, E routed experts, S shared experts, P parts of a weight (see split_weight).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.moe_choice import Choice
from engine.kernels.moe_gate import (
    ROUTE_ROWS,
    GateSpec,
    GateState,
    few_tiles,
    new_choice,
    score_experts,
    write_choice,
)

_EXPERTS = {1: 2, 2: 4}  # of a program, by tokens: best of a whole step on an H100
_MAX_TOKENS = max(_EXPERTS)
_MAX_EXPERTS = 128  # all are compared with all


@dataclass(frozen=True, slots=True)
class NormedChoice:
    sum_TD: torch.Tensor
    normed_TD: torch.Tensor
    choice: Choice


def takes_few(num_tokens: int, spec: GateSpec) -> bool:
    return 0 < num_tokens <= _MAX_TOKENS and spec.num_experts <= _MAX_EXPERTS


def choose_of_sum(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    gate: tuple[torch.Tensor, torch.Tensor | None],
    spec: GateSpec,
    state: GateState,
) -> NormedChoice:
    """choose_experts_fused of the norm of x + delta, both as add_rms_norm_ has them. norm: weight and eps;
    gate: weight [P, E, D] and bias."""
    num_tokens, hidden = x_TD.shape
    assert x_TD.is_contiguous() and delta_TD.is_contiguous()
    weight_PED, bias_E = gate
    choice = new_choice(num_tokens, 1, ROUTE_ROWS, spec, x_TD.device)
    route = choice.route
    assert route is not None
    sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    experts = _EXPERTS[num_tokens]
    padded = max(experts, triton.next_power_of_2(spec.num_experts))
    logits = torch.empty(num_tokens, padded, dtype=torch.float32, device=x_TD.device)
    _gate_few_kernel[(padded // experts,)](
        x_TD,
        delta_TD,
        norm[0],
        sum_TD,
        normed_TD,
        weight_PED,
        bias_E,
        logits,
        choice.weights_TK,
        choice.ids_TK,
        choice.counts_GE,
        state.load_E,
        state.arrivals_G,
        route.sorted_pairs_P,
        route.tile_expert_M,
        hidden,
        route.tile_expert_M.shape[0],
        norm[1],
        spec.scaling_factor,
        TOKENS=num_tokens,
        TERMS=weight_PED.shape[0],
        E=spec.num_experts,
        E_PAD=padded,
        SHARED=spec.num_shared,
        TOP_K=spec.top_k,
        IS_SIGMOID=spec.is_sigmoid,
        HAS_BIAS=bias_E is not None,
        GROUPS=spec.num_groups,
        TOPK_GROUPS=spec.topk_groups,
        IS_GROUP_OF_TWO=spec.is_group_of_two,
        NORM=spec.norm_weights,
        EXPERTS=experts,
        BLOCK_D=triton.next_power_of_2(hidden),
        TILES_PAD=triton.next_power_of_2(few_tiles(_MAX_TOKENS, spec)),
        num_warps=4,
        **launch_options(num_tokens),
    )
    return NormedChoice(sum_TD, normed_TD, choice)


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_few_kernel(
    x_ptr,
    delta_ptr,
    norm_weight_ptr,
    sum_ptr,
    normed_ptr,
    w_ptr,
    bias_ptr,
    logits_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    load_ptr,
    arrivals_ptr,
    pairs_ptr,
    tiles_ptr,
    hidden,
    num_tiles,
    eps,
    scaling_factor,
    TOKENS: tl.constexpr,
    TERMS: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    IS_GROUP_OF_TWO: tl.constexpr,
    NORM: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_PAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    pid = tl.program_id(0)
    PROGRAMS: tl.constexpr = E_PAD // EXPERTS
    experts = pid * EXPERTS + tl.arange(0, EXPERTS)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < hidden
    w = tl.zeros((EXPERTS, BLOCK_D), tl.float32)
    is_weight = (experts < E)[:, None] & is_dim[None, :]
    for i in tl.static_range(TERMS):  # the smallest part first: their sum is exact
        part = w_ptr + ((TERMS - 1 - i) * E + experts[:, None]) * hidden + dims[None, :]
        w += tl.load(part, mask=is_weight, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    for t in tl.static_range(TOKENS):
        x = tl.load(x_ptr + t * hidden + dims, mask=is_dim, other=0.0)
        delta = tl.load(delta_ptr + t * hidden + dims, mask=is_dim, other=0.0)
        total = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        x32 = total.to(tl.float32)
        normed = (x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / hidden + eps) * norm_weight).to(x.dtype)
        if pid == 0:
            tl.store(sum_ptr + t * hidden + dims, total, mask=is_dim)
            tl.store(normed_ptr + t * hidden + dims, normed, mask=is_dim)
        tl.store(logits_ptr + t * E_PAD + experts, tl.sum(w * normed.to(tl.float32)[None, :], 1))
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1) != PROGRAMS - 1:
        return
    tl.store(arrivals_ptr, 0)
    rows = tl.arange(0, TOKENS)
    ids = tl.arange(0, E_PAD)[None, :] + tl.zeros((TOKENS, 1), tl.int32)
    logits = tl.load(logits_ptr + rows[:, None] * E_PAD + ids, mask=ids < E, other=0.0, cache_modifier=".cg")
    scores, choice = score_experts(
        logits, ids, bias_ptr, E, E_PAD, IS_SIGMOID, HAS_BIAS, GROUPS, TOPK_GROUPS, IS_GROUP_OF_TWO
    )
    mine, others = choice[:, :, None], choice[:, None, :]
    is_better = (others > mine) | ((others == mine) & (ids[:, None, :] < ids[:, :, None]))
    rank = tl.sum(is_better.to(tl.int32), 2)
    factor = tl.full((TOKENS,), scaling_factor, tl.float32)
    if NORM:
        total = tl.zeros((TOKENS,), tl.float32)
        for k in tl.static_range(TOP_K):
            total += tl.sum(tl.where(rank == k, scores, 0.0), 1)
        factor = factor / (total + 1e-20)
    write_choice(
        scores * factor[:, None],
        rank,
        ids,
        0,
        weights_ptr,
        ids_ptr,
        counts_ptr,
        load_ptr,
        pairs_ptr,
        tiles_ptr,
        TOKENS,
        num_tiles,
        E,
        E_PAD,
        SHARED,
        TOP_K,
        TOKENS,
        True,
        TILES_PAD,
    )
