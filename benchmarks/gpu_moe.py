"""The experts of DeepSeek-V2-Lite on one device: made, checked, timed, and the search for their tiles."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch

from benchmarks.gpu_timing import BF16_FLOPS_PER_S, BYTES_PER_S, FP8_FLOPS_PER_S, graph_time
from engine.checkpoint import fp8
from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.fp8_quantise import Fp8Rows, quantise_rows
from engine.kernels.moe_choice import Choice, Route
from engine.kernels.moe_gate import GateSpec, choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_gemm import ExpertWeights, Tile, multiply_down, multiply_up_gate
from engine.kernels.moe_route import max_tiles, route_pairs
from engine.kernels.moe_tiles import MoeTiles

HIDDEN, SIZE, NUM_EXPERTS, NUM_SHARED, TOP_K = 2048, 1408, 64, 2, 6
NUM_SETS = 3  # of weights: more than the cache holds, whatever the tokens choose
SPEC = GateSpec(
    num_experts=NUM_EXPERTS,
    num_shared=NUM_SHARED,
    top_k=TOP_K,
    is_sigmoid=False,
    num_groups=1,
    topk_groups=1,
    is_group_of_two=False,
    norm_weights=False,
    scaling_factor=1.0,
)
TUNED_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
FORMATS = {"bf16": False, "fp8": True}


def random_weights(is_fp8: bool, num: int = SPEC.num_all_experts) -> ExpertWeights:
    up_gate = torch.randn(num, 2 * SIZE, HIDDEN, device="cuda", dtype=torch.bfloat16).mul_(HIDDEN**-0.5)
    down = torch.randn(num, HIDDEN, SIZE, device="cuda", dtype=torch.bfloat16).mul_(SIZE**-0.5)
    if not is_fp8:
        return ExpertWeights(up_gate, down)
    up_gate_value, up_gate_scale = _fp8(up_gate)
    down_value, down_scale = _fp8(down)
    return ExpertWeights(up_gate_value, down_value, up_gate_scale, down_scale)


def _fp8(weight_ENK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = zip(*(fp8.quantise(w, (FP8_GROUP, FP8_GROUP)) for w in weight_ENK), strict=True)
    return torch.stack(values), torch.stack(scales)


def random_choice(num_tokens: int) -> Choice:
    """Of random tokens by a random gate."""
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    gate = split_weight(torch.randn(NUM_EXPERTS, HIDDEN, device="cuda").bfloat16().float(), torch.bfloat16)
    state = new_gate_state(NUM_EXPERTS, "cuda")
    return choose_experts_fused(x, gate, None, SPEC, state)


def floor_s(num_tokens: int, choice: Choice, is_fp8: bool) -> float:
    """Of both products: the weights of the experts in use once, and the rows in and out."""
    num_used = int(choice.ids_TK.unique().numel())
    pairs = num_tokens * SPEC.experts_per_token
    weight_bytes = num_used * 3 * SIZE * HIDDEN * (1 if is_fp8 else 2)
    row_bytes = 2 * (num_tokens * HIDDEN + 2 * pairs * SIZE + pairs * HIDDEN)
    flops = 2 * pairs * 3 * SIZE * HIDDEN
    peak = FP8_FLOPS_PER_S if is_fp8 else BF16_FLOPS_PER_S
    return max((weight_bytes + row_bytes) / BYTES_PER_S, flops / peak)


@dataclass(frozen=True, slots=True)
class Candidate:
    """quantises_inside and quantises_h as in MoeTiles; of a second product whose rows come quantised, the
    first is False."""

    rows: int
    is_gated: bool
    tile: Tile
    quantises_inside: bool
    quantises_h: bool = False


def candidates(num_tokens: int, is_fp8: bool) -> list[Candidate]:
    found = []
    for rows in _row_choices(num_tokens, is_fp8):
        for tile in _fp8_tiles(rows, num_tokens) if is_fp8 else _tiles(rows, num_tokens):
            for is_gated in (True, False):
                if is_gated and rows * tile.columns > 128 * 128:
                    continue
                if is_fp8 and rows * tile.columns > (64 * 128 if is_gated else 128 * 128):
                    continue
                ways = _quantising(rows, tile, is_gated) if is_fp8 else [(True, False)]
                found += [Candidate(rows, is_gated, tile, *way) for way in ways]
    return found


def _quantising(rows: int, tile: Tile, is_gated: bool) -> list[tuple[bool, bool]]:
    insides = (True, False) if rows <= 32 else (False,)
    if not is_gated:
        return [*((inside, False) for inside in insides), (False, True)]
    return [(inside, h) for inside in insides for h in (False, True) if not h or tile.columns == FP8_GROUP]


def _row_choices(num_tokens: int, is_fp8: bool) -> tuple[int, ...]:
    if num_tokens <= 16:
        return (16,)
    if num_tokens <= 128:
        return (16, 32, 64) if is_fp8 and num_tokens > 64 else (16, 32)
    if num_tokens <= 512:
        return (32, 64)
    return (64, 128)


def _fp8_tiles(rows: int, num_tokens: int) -> list[Tile]:
    group = 1 if num_tokens <= 256 else 8
    tiles = []
    for columns, num_stages in itertools.product((64, 128), (3, 4)):
        for num_warps, is_bulk in itertools.product(
            (4, 8) if rows * columns >= 64 * 128 else (4,), (False, True)
        ):
            tiles.append(Tile(columns, 128, num_warps, num_stages, group, is_bulk))
    if rows <= 32:
        for columns, num_stages in itertools.product((64, 128), (3, 4, 6)):
            tiles.append(Tile(columns, 128, 4, num_stages, group, is_bulk=True, is_swapped=True))
    return tiles


def _tiles(rows: int, num_tokens: int) -> list[Tile]:
    group = 1 if num_tokens <= 256 else 8
    tiles = []
    if rows <= 32:
        for columns, depth in itertools.product((32, 64, 128), (64, 128)):
            for num_stages in (3, 5) if depth == 64 else (3, 4):
                tiles.append(Tile(columns, depth, 4, num_stages, group))
                if columns >= 64:
                    tiles.append(Tile(columns, depth, 4, num_stages, group, is_bulk=True))
        tiles.append(Tile(16, 128, 4, 4, group))
        tiles.append(Tile(16, 256, 4, 3, group))
        return tiles
    for columns, is_bulk in itertools.product((64, 128, 256), (False, True)):
        for num_warps in (4, 8) if rows * columns >= 64 * 128 else (4,):
            tiles += [Tile(columns, 64, num_warps, num_stages, group, is_bulk) for num_stages in (4, 3)]
    return tiles


class MoeBench:
    """The weights of a few layers in one format."""

    def __init__(self, is_fp8: bool, num_sets: int = NUM_SETS) -> None:
        self.is_fp8 = is_fp8
        self.sets = [random_weights(is_fp8) for _ in range(num_sets)]

    def time(self, candidate: Candidate, num_tokens: int, choices: list[Choice]) -> float:
        """Seconds of one of the two products, quantising its rows included."""
        num_tiles = max_tiles(num_tokens, TOP_K, NUM_SHARED, NUM_EXPERTS, candidate.rows)
        routes = [route_pairs(choice, num_tiles, candidate.rows) for choice in choices]
        x = _rows(candidate, num_tokens, self.is_fp8)
        work = list(zip(self.sets, routes, strict=False))
        calls = [partial(_multiply, candidate, x, weights, route) for weights, route in work]
        return graph_time(calls, num_replays=3, num_rounds=1 if num_tokens > 512 else 2)

    def tune(self, num_tokens: int, deadline: float) -> tuple[MoeTiles, float, list[tuple[float, Candidate]]]:
        choices = [random_choice(num_tokens) for _ in self.sets]
        results: list[tuple[float, Candidate]] = []
        for candidate in candidates(num_tokens, self.is_fp8):
            if time.monotonic() > deadline:
                break
            try:
                results.append((self.time(candidate, num_tokens, choices), candidate))
            except Exception as error:  # noqa: BLE001 - a tile that does not fit the device is no answer
                if num_tokens in (128, 1024):
                    print("skipped", candidate, repr(error)[:80])
        best, best_s = None, float("inf")
        for rows, inside, h in {
            (c.rows, c.quantises_inside, c.quantises_h) for _, c in results if c.is_gated
        }:
            up = _fastest(results, (rows, True, inside, h))
            down = _fastest(results, (rows, False, inside and not h, h))
            if up and down and up[0] + down[0] < best_s:
                best, best_s = MoeTiles(rows, up[1].tile, down[1].tile, inside, h), up[0] + down[0]
        if best is None:
            raise RuntimeError(f"no tile works for {num_tokens} tokens")
        return best, best_s, sorted(results, key=lambda r: r[0])


def _rows(candidate: Candidate, num_tokens: int, is_fp8: bool) -> torch.Tensor | Fp8Rows:
    """What a product of the candidate gets, before it is quantised unless another product does that."""
    shape = (num_tokens, HIDDEN) if candidate.is_gated else (num_tokens * SPEC.experts_per_token, SIZE)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return quantise_rows(x) if is_fp8 and candidate.quantises_h and not candidate.is_gated else x


def _multiply(candidate: Candidate, x: torch.Tensor | Fp8Rows, weights: ExpertWeights, route: Route) -> None:
    if weights.is_fp8 and not candidate.quantises_inside and isinstance(x, torch.Tensor):
        x = quantise_rows(x)
    if candidate.is_gated:
        multiply_up_gate(
            x,
            weights,
            route,
            SPEC.experts_per_token,
            candidate.tile,
            quantises_out=candidate.quantises_h,
        )
    else:
        multiply_down(x, weights, route, candidate.tile)


def _fastest(
    results: list[tuple[float, Candidate]], wanted: tuple[int, bool, bool, bool]
) -> tuple[float, Candidate] | None:
    """wanted: rows, is_gated, quantises_inside, quantises_h."""
    found = [
        (seconds, c)
        for seconds, c in results
        if (c.rows, c.is_gated, c.quantises_inside, c.quantises_h) == wanted
    ]
    return min(found, default=None, key=lambda result: result[0])


def _compile(work: tuple[bool, list[Candidate]]) -> int:
    """In a process of its own: fills the compiler's cache on disk."""
    is_fp8, mine = work
    weights, choice, num_done = random_weights(is_fp8), random_choice(8), 0
    for candidate in mine:
        try:
            route = route_pairs(
                choice, max_tiles(8, TOP_K, NUM_SHARED, NUM_EXPERTS, candidate.rows), candidate.rows
            )
            _multiply(candidate, _rows(candidate, 8, is_fp8), weights, route)
            num_done += 1
        except Exception:  # noqa: BLE001 - reported when it is timed
            continue
    torch.cuda.synchronize()
    return num_done


def compile_all(formats: list[bool], tokens: tuple[int, ...]) -> tuple[int, float]:
    """All candidates in parallel; the number compiled and the seconds it took. formats: is it FP8."""
    began = time.monotonic()
    work: list[tuple[bool, list[Candidate]]] = []
    num_processes = max(2, (os.cpu_count() or 2) - 1)
    for is_fp8 in formats:
        unique = {c for num_tokens in tokens for c in candidates(num_tokens, is_fp8)}
        ordered = sorted(unique, key=repr)
        share = num_processes // len(formats)
        work += [(is_fp8, ordered[i::share]) for i in range(share)]
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(_compile, work)), time.monotonic() - began
