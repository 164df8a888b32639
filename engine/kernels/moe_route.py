# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""A stable sort of (token, expert) pairs by expert, and the tiles that a grouped product cuts them into.

No program needs another's result: each adds up the counts of the groups of tokens before its own, so the sort
is one launch, the same every time, without atomics or a look from the host.

P pairs (token * K + k), E experts (shared ones included), M tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from engine.kernels.moe_choice import Choice, Route

_MAX_ONE_HOT = 16384  # elements of a matrix that ranks pairs: sixteen times more take minutes to compile
_TILES_AT_ONCE = 64


def max_tiles(num_tokens: int, top_k: int, num_shared: int, num_experts: int, tile_rows: int) -> int:
    """However the tokens choose: a function of the batch's shape alone. A multiple of 4, so that the columns
    of a route start at addresses as even as those of other tensors: kernels are compiled for that."""
    num_pairs = num_tokens * top_k
    routed = min(num_pairs, num_pairs // tile_rows + min(num_experts, num_pairs))
    return 4 * triton.cdiv(routed + num_shared * triton.cdiv(num_tokens, tile_rows), 4)


def pairs_at_once(num_pairs: int, num_experts: int) -> int:
    """So many are compared with each other and with all experts, both powers of two."""
    most = min(math.isqrt(_MAX_ONE_HOT), max(1, _MAX_ONE_HOT // num_experts))
    return min(triton.next_power_of_2(num_pairs), most)


def route_pairs(choice: Choice, num_tiles: int, tile_rows: int) -> Route:
    num_tokens, k = choice.ids_TK.shape
    num_groups, num_experts = choice.counts_GE.shape
    pairs = torch.empty(num_tokens * k, dtype=torch.int32, device=choice.ids_TK.device)
    tiles_3M = torch.empty(3, num_tiles, dtype=torch.int32, device=choice.ids_TK.device)
    padded = triton.next_power_of_2(num_experts)
    _route_kernel[(num_groups,)](
        choice.ids_TK,
        choice.counts_GE,
        pairs,
        tiles_3M,
        num_tokens * k,
        num_groups,
        num_tiles,
        PAIRS=choice.group_size * k,
        E=num_experts,
        E_PAD=padded,
        TILE_ROWS=tile_rows,
        BLOCK=pairs_at_once(choice.group_size * k, padded),
        BLOCK_G=1 if num_groups == 1 else min(16, max(1, 4096 // padded)),
        BLOCK_M=_TILES_AT_ONCE,
        num_warps=8,
    )
    return Route(pairs, tiles_3M[0], tiles_3M[1], tiles_3M[2], tile_rows)


def route_pairs_reference(choice: Choice, num_tiles: int, tile_rows: int) -> Route:
    flat = choice.ids_TK.flatten()
    num_experts = choice.counts_GE.shape[1]
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    tiles = torch.zeros(3, num_tiles, dtype=torch.int32)
    first, m = 0, 0
    for expert, count in enumerate(counts):
        for start in range(first, first + count, tile_rows):
            tiles[:, m] = torch.tensor([expert, start, min(start + tile_rows, first + count)])
            m += 1
        first += count
    sorted_pairs = torch.argsort(flat, stable=True).int()
    return Route(sorted_pairs, tiles[0], tiles[1], tiles[2], tile_rows)


@triton.jit(do_not_specialize=["num_pairs", "num_groups", "num_tiles"])
def _route_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    tiles_ptr,
    num_pairs,
    num_groups,
    num_tiles,
    PAIRS: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    g = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), tl.int32)
    before = tl.zeros((E_PAD,), tl.int32)
    for first in range(0, num_groups, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        is_there = (groups < num_groups)[:, None] & (experts < E)[None, :]
        block = tl.load(counts_ptr + groups[:, None] * E + experts[None, :], mask=is_there, other=0)
        counts += tl.sum(block, 0)
        before += tl.sum(tl.where((groups < g)[:, None], block, 0), 0)
    starts = tl.cumsum(counts, 0) - counts

    place = starts + before
    for first in range(0, PAIRS, BLOCK):
        inside = first + tl.arange(0, BLOCK)
        pairs = g * PAIRS + inside
        is_pair = (inside < PAIRS) & (pairs < num_pairs)
        ids = tl.load(ids_ptr + pairs, mask=is_pair, other=E_PAD)
        others = tl.arange(0, BLOCK)
        is_other = (first + others < PAIRS) & (g * PAIRS + first + others < num_pairs)
        other_ids = tl.load(ids_ptr + g * PAIRS + first + others, mask=is_other, other=E_PAD)
        is_before = (ids[:, None] == other_ids[None, :]) & (inside[:, None] > first + others[None, :])
        is_mine = ids[:, None] == experts[None, :]
        mine = tl.sum(tl.where(is_mine, place[None, :], 0), 1) + tl.sum(is_before.to(tl.int32), 1)
        tl.store(pairs_ptr + mine, pairs, mask=is_pair)
        place += tl.sum(is_mine.to(tl.int32), 0)

    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles, 0)
    for first in range(g * BLOCK_M, num_tiles, num_groups * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        holds = (m[:, None] >= (tile_ends - tiles)[None, :]) & (m[:, None] < tile_ends[None, :])
        is_used = m < tl.max(tile_ends, 0)
        expert = tl.sum(tl.where(holds, experts[None, :], 0), 1)
        index = m - tl.sum(tl.where(holds, (tile_ends - tiles)[None, :], 0), 1)
        start = tl.sum(tl.where(holds, starts[None, :], 0), 1) + index * TILE_ROWS
        end = tl.sum(tl.where(holds, (starts + counts)[None, :], 0), 1)
        end = tl.minimum(end, start + TILE_ROWS)
        tl.store(tiles_ptr + m, expert, mask=m < num_tiles)
        tl.store(tiles_ptr + num_tiles + m, tl.where(is_used, start, 0), mask=m < num_tiles)
        tl.store(tiles_ptr + 2 * num_tiles + m, tl.where(is_used, end, 0), mask=m < num_tiles)
