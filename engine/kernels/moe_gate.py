# ruff: noqa: PLR0913, PLR0915, C901 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The gate in one kernel: scores, choice of experts, weights, and how many tokens each expert gets.

T tokens, D hidden, E routed experts, S shared experts, K experts a token (routed), G groups of tokens.
The shared experts follow the routed ones: every token goes to experts E .. E + S - 1 with weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.moe_choice import Choice, Route

_MIN_DOT = 16  # rows or columns of the smallest matrix product
_MAX_SMALL_GROUPS = 32  # beyond, larger groups: fewer rows of counts to add up
MAX_WEIGHT_PARTS = 3


@dataclass(frozen=True, slots=True)
class GateSpec:
    """What stays the same from step to step."""

    num_experts: int
    num_shared: int
    top_k: int
    is_sigmoid: bool
    num_groups: int  # 1: no limit on groups
    topk_groups: int
    is_group_of_two: bool  # a group is as good as its best two experts together, not as its best
    norm_weights: bool
    scaling_factor: float

    @property
    def experts_per_token(self) -> int:
        return self.top_k + self.num_shared

    @property
    def num_all_experts(self) -> int:
        return self.num_experts + self.num_shared


@dataclass(frozen=True, slots=True)
class GateState:
    """What a gate writes from call to call. So one gate's calls follow each other on one stream."""

    load_E: torch.Tensor  # int64: tokens of each routed expert so far
    arrivals_G: torch.Tensor  # int32, 0 between calls: parts of a product that have arrived


def new_gate_state(num_experts: int, device: torch.device | str) -> GateState:
    return GateState(
        torch.zeros(num_experts, dtype=torch.int64, device=device),
        torch.zeros(_MAX_SMALL_GROUPS, dtype=torch.int32, device=device),
    )


def split_weight(weight_ED: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[P, E, D] in `dtype`, whose sum over P is the float32 weight: exact products on bf16 tensor cores. A
    checkpoint that stores bf16 gives one part."""
    parts, rest = [], weight_ED.float()
    for _ in range(MAX_WEIGHT_PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
        if not bool(rest.any()):
            break
    return torch.stack(parts)


def choose_experts_fused(
    x_TD: torch.Tensor,
    weight_PED: torch.Tensor,
    bias_E: torch.Tensor | None,
    spec: GateSpec,
    state: GateState,
) -> Choice:
    """As moe.gate.choose_experts of x @ weight.T; of equal scores the lower id wins. x has the dtype of
    weight. The choice of up to 16 tokens comes with its route."""
    num_tokens, hidden = x_TD.shape
    is_small = num_tokens <= _MIN_DOT * _MAX_SMALL_GROUPS
    group_size = _MIN_DOT if is_small else 4 * _MIN_DOT
    num_groups = triton.cdiv(num_tokens, group_size)
    choice = _new_choice(num_tokens, num_groups, group_size, spec, x_TD.device)
    padded = max(_MIN_DOT, triton.next_power_of_2(spec.num_experts))
    parts = (8 if num_groups <= _MAX_SMALL_GROUPS // 2 else 4) if is_small else 1
    partial = None
    if parts > 1:
        partial = torch.empty(num_groups, parts, group_size, padded, dtype=torch.float32, device=x_TD.device)
    block = 128 if padded <= 128 else 64
    route = choice.route
    _gate_kernel[(num_groups, parts)](
        x_TD,
        weight_PED,
        bias_E,
        choice.weights_TK,
        choice.ids_TK,
        choice.counts_GE,
        state.load_E,
        partial,
        state.arrivals_G,
        None if route is None else route.sorted_pairs_P,
        None if route is None else route.tile_expert_M,
        num_tokens,
        hidden,
        0 if route is None else route.tile_expert_M.shape[0],
        x_TD.stride(0),
        spec.scaling_factor,
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
        BLOCK_T=group_size,
        BLOCK_D=block,
        PARTS=parts,
        PART_D=block * triton.cdiv(triton.cdiv(hidden, parts), block),
        ROUTES=route is not None,
        TILES_PAD=triton.next_power_of_2(_few_tiles(_MIN_DOT, spec)),
        PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32",
        num_warps=4 if padded <= 64 and is_small else 8,
        num_stages=4,
        **launch_options(num_tokens),
    )
    return choice


def _few_tiles(num_tokens: int, spec: GateSpec) -> int:
    """One for each expert in use; a multiple of 4, for even addresses."""
    return 4 * triton.cdiv(min(num_tokens * spec.top_k, spec.num_experts) + spec.num_shared, 4)


def _new_choice(
    num_tokens: int, num_groups: int, group_size: int, spec: GateSpec, device: torch.device
) -> Choice:
    shape = (num_tokens, spec.experts_per_token)
    weights_TK = torch.empty(shape, dtype=torch.float32, device=device)
    ids_TK = torch.empty(shape, dtype=torch.int32, device=device)
    counts_GE = torch.empty(num_groups, spec.num_all_experts, dtype=torch.int32, device=device)
    route = None
    if num_tokens <= _MIN_DOT:
        pairs = torch.empty(shape[0] * shape[1], dtype=torch.int32, device=device)
        tiles_3M = torch.empty(3, _few_tiles(num_tokens, spec), dtype=torch.int32, device=device)
        route = Route(pairs, tiles_3M[0], tiles_3M[1], tiles_3M[2], _MIN_DOT)
    return Choice(weights_TK, ids_TK, counts_GE, group_size, route)


@triton.jit
def _close_groups(choice, ids, E: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TWO):
    """The choice with -inf for the experts of all but the best groups."""
    group_of = ids // (E // GROUPS)
    group_scores = tl.full(choice.shape, float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        inside = tl.where((group_of == g) & (ids < E), choice, float("-inf"))
        best = tl.max(inside, 1)
        if TWO:
            best_id = tl.argmax(inside, 1)
            second = tl.max(tl.where(ids == best_id[:, None], float("-inf"), inside), 1)
            best += second
        group_scores = tl.where((group_of == g) & (ids < E), best[:, None], group_scores)
    is_open = tl.zeros(choice.shape, tl.int1)
    for _ in tl.static_range(TOPK_GROUPS):
        group = tl.argmax(group_scores, 1) // (E // GROUPS)
        is_chosen = group_of == group[:, None]
        is_open = is_open | is_chosen
        group_scores = tl.where(is_chosen, float("-inf"), group_scores)
    return tl.where(is_open, choice, float("-inf"))


@triton.jit
def _route_few(
    is_chosen,
    rank,
    rows,
    counts,
    pairs_ptr,
    tiles_ptr,
    num_tokens,
    num_tiles,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    TILES_PAD: tl.constexpr,
):
    """moe_route for tokens of which no expert gets more than one tile's rows."""
    experts = tl.arange(0, E_PAD)
    chosen = is_chosen.to(tl.int32)
    starts = tl.cumsum(counts, 0) - counts
    place = starts[None, :] + tl.cumsum(chosen, 0) - chosen
    pairs = rows[:, None] * (TOP_K + SHARED) + rank
    tl.store(pairs_ptr + place, pairs, mask=is_chosen)
    is_used = (counts > 0).to(tl.int32)
    tile = tl.cumsum(is_used, 0) - is_used
    tl.store(tiles_ptr + tile, experts, mask=counts > 0)
    tl.store(tiles_ptr + num_tiles + tile, starts, mask=counts > 0)
    tl.store(tiles_ptr + 2 * num_tiles + tile, starts + counts, mask=counts > 0)
    num_used = tl.sum(is_used, 0)
    for s in tl.static_range(SHARED):
        start = num_tokens * (TOP_K + s)
        shared_pairs = rows * (TOP_K + SHARED) + TOP_K + s
        tl.store(pairs_ptr + start + rows, shared_pairs, mask=rows < num_tokens)
        tl.store(tiles_ptr + num_used + s, E + s)
        tl.store(tiles_ptr + num_tiles + num_used + s, start)
        tl.store(tiles_ptr + 2 * num_tiles + num_used + s, start + num_tokens)
    tiles = tl.arange(0, TILES_PAD)
    is_empty = (tiles >= num_used + SHARED) & (tiles < num_tiles)
    tl.store(tiles_ptr + num_tiles + tiles, tiles * 0, mask=is_empty)
    tl.store(tiles_ptr + 2 * num_tiles + tiles, tiles * 0, mask=is_empty)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _gate_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    load_ptr,
    partial_ptr,
    arrivals_ptr,
    pairs_ptr,
    tiles_ptr,
    num_tokens,
    hidden,
    num_tiles,
    x_stride,
    scaling_factor,
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    PART_D: tl.constexpr,
    ROUTES: tl.constexpr,
    TILES_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    g = tl.program_id(0)
    rows = g * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = rows < num_tokens
    experts = tl.arange(0, E_PAD)
    dims = tl.arange(0, BLOCK_D)
    x = x_ptr + rows[:, None].to(tl.int64) * x_stride + dims[None, :]
    logits = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    part = tl.program_id(1)
    for term in tl.static_range(TERMS):
        w = w_ptr + term * E * hidden + experts[None, :] * hidden + dims[:, None]
        for d in range(part * PART_D, tl.minimum(hidden, (part + 1) * PART_D), BLOCK_D):
            is_dim = dims < hidden - d
            x_block = tl.load(x + d, mask=is_row[:, None] & is_dim[None, :], other=0.0)
            w_block = tl.load(w + d, mask=(experts < E)[None, :] & is_dim[:, None], other=0.0)
            logits = tl.dot(x_block, w_block, logits, input_precision=PRECISION)
    if PARTS > 1:
        # The last program to arrive adds the parts up, in their order.
        block = tl.arange(0, BLOCK_T)[:, None] * E_PAD + experts[None, :]
        partial = partial_ptr + g * PARTS * BLOCK_T * E_PAD + block
        tl.store(partial + part * BLOCK_T * E_PAD, logits)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + g, 1) != PARTS - 1:
            return
        tl.store(arrivals_ptr + g, 0)
        logits = tl.zeros((BLOCK_T, E_PAD), tl.float32)
        for i in tl.static_range(PARTS):
            logits += tl.load(partial + i * BLOCK_T * E_PAD, cache_modifier=".cg")
    logits = tl.where((experts < E)[None, :], logits, float("-inf"))
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    ids = experts[None, :] + tl.zeros((BLOCK_T, 1), tl.int32)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts, mask=experts < E, other=0.0)[None, :]
    # A NaN must not lead past the last expert, whose weights do not exist.
    choice = tl.where(choice == choice, choice, -1.0)
    choice = tl.where(ids < E, choice, float("-inf"))
    if TOPK_GROUPS < GROUPS:
        choice = _close_groups(choice, ids, E, GROUPS, TOPK_GROUPS, IS_GROUP_OF_TWO)

    # Chosen first, written after: the weights may be normed by their sum.
    rank = tl.full((BLOCK_T, E_PAD), TOP_K, tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(tl.where(rank < TOP_K, float("-inf"), choice), 1)
        is_best = ids == best[:, None]
        rank = tl.where(is_best, k, rank)
        total += tl.sum(tl.where(is_best, scores, 0.0), 1)
    factor = tl.full((BLOCK_T,), scaling_factor, tl.float32)
    if NORM:
        factor = factor / (total + 1e-20)
    is_chosen = (rank < TOP_K) & is_row[:, None]
    place = rows[:, None].to(tl.int64) * (TOP_K + SHARED) + rank
    tl.store(weights_ptr + place, scores * factor[:, None], mask=is_chosen)
    tl.store(ids_ptr + place, ids, mask=is_chosen)
    counts = tl.sum(is_chosen.to(tl.int32), 0)
    tl.store(counts_ptr + g * (E + SHARED) + experts, counts, mask=experts < E)
    tl.atomic_add(load_ptr + experts, counts.to(tl.int64), mask=(experts < E) & (counts > 0), sem="relaxed")
    if ROUTES:
        _route_few(
            is_chosen,
            rank,
            rows,
            counts,
            pairs_ptr,
            tiles_ptr,
            num_tokens,
            num_tiles,
            E,
            E_PAD,
            SHARED,
            TOP_K,
            TILES_PAD,
        )
    for s in tl.static_range(SHARED):
        place_s = rows.to(tl.int64) * (TOP_K + SHARED) + TOP_K + s
        tl.store(weights_ptr + place_s, tl.full((BLOCK_T,), 1.0, tl.float32), mask=is_row)
        tl.store(ids_ptr + place_s, tl.full((BLOCK_T,), E + s, tl.int32), mask=is_row)
        tl.store(counts_ptr + g * (E + SHARED) + E + s, tl.sum(is_row.to(tl.int32), 0))
