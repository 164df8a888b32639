# ruff: noqa: PLR0913, PLR0915 - a kernel takes its pointers, strides and sizes one by one
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

_MIN_DOT = 16  # rows or columns of the smallest matrix product
_FEW_TOKENS = 512  # up to here small groups: more programs; beyond, fewer rows of counts to add up
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
class Choice:
    weights_TK: torch.Tensor  # float32 [T, K + S]
    ids_TK: torch.Tensor  # int32 [T, K + S]; the routed experts by falling score
    counts_GE: torch.Tensor  # int32 [G, E + S]: tokens of each group of `group_size` tokens by expert
    group_size: int


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
    load_E: torch.Tensor,
) -> Choice:
    """As moe.gate.choose_experts of x @ weight.T; of equal scores the lower id wins. x has the dtype of
    weight. Adds the tokens of each routed expert to load_E (int64)."""
    num_tokens, hidden = x_TD.shape
    group_size = _MIN_DOT if num_tokens <= _FEW_TOKENS else 4 * _MIN_DOT
    num_groups = triton.cdiv(num_tokens, group_size)
    shape = (num_tokens, spec.experts_per_token)
    choice = Choice(
        torch.empty(shape, dtype=torch.float32, device=x_TD.device),
        torch.empty(shape, dtype=torch.int32, device=x_TD.device),
        torch.empty(num_groups, spec.num_all_experts, dtype=torch.int32, device=x_TD.device),
        group_size,
    )
    padded = max(_MIN_DOT, triton.next_power_of_2(spec.num_experts))
    _gate_kernel[(num_groups,)](
        x_TD,
        weight_PED,
        bias_E,
        choice.weights_TK,
        choice.ids_TK,
        choice.counts_GE,
        load_E,
        num_tokens,
        hidden,
        x_TD.stride(0),
        spec.scaling_factor,
        PARTS=weight_PED.shape[0],
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
        BLOCK_D=128 if padded <= 128 else 64,
        PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32",
        num_warps=4 if padded <= 64 and group_size == _MIN_DOT else 8,
        num_stages=4,
    )
    return choice


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


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    load_ptr,
    num_tokens,
    hidden,
    x_stride,
    scaling_factor,
    PARTS: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    g = tl.program_id(0)
    rows = g * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = rows < num_tokens
    experts = tl.arange(0, E_PAD)
    dims = tl.arange(0, BLOCK_D)
    x = x_ptr + rows[:, None].to(tl.int64) * x_stride + dims[None, :]
    logits = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for part in tl.static_range(PARTS):
        w = w_ptr + part * E * hidden + experts[None, :] * hidden + dims[:, None]
        for d in range(0, hidden, BLOCK_D):
            is_dim = dims < hidden - d
            x_block = tl.load(x + d, mask=is_row[:, None] & is_dim[None, :], other=0.0)
            w_block = tl.load(w + d, mask=(experts < E)[None, :] & is_dim[:, None], other=0.0)
            logits = tl.dot(x_block, w_block, logits, input_precision=PRECISION)
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
    for s in tl.static_range(SHARED):
        place_s = rows.to(tl.int64) * (TOP_K + SHARED) + TOP_K + s
        tl.store(weights_ptr + place_s, tl.full((BLOCK_T,), 1.0, tl.float32), mask=is_row)
        tl.store(ids_ptr + place_s, tl.full((BLOCK_T,), E + s, tl.int32), mask=is_row)
        tl.store(counts_ptr + g * (E + SHARED) + E + s, tl.sum(is_row.to(tl.int32), 0))
