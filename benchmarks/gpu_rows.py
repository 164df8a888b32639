"""The lines of the kernel table: what is timed, its floor, and what plain torch does in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.gpu_checks import VOCAB, row_sampling
from benchmarks.gpu_moe import HIDDEN, NUM_EXPERTS, NUM_SHARED, SPEC, TOP_K, MoeBench, floor_s, random_choice
from benchmarks.gpu_timing import (
    BYTES_PER_S,
    FP8_FLOPS_PER_S,
    eager_time,
    graph_time,
    relative_error,
)
from engine.checkpoint import fp8
from engine.kernels.few_rows import MAX_ROWS, FewRowsTile, multiply_few_rows
from engine.kernels.fp8_quantise import quantise_rows
from engine.kernels.gated_silu import gated_silu_rows
from engine.kernels.linear import multiply_fp8
from engine.kernels.linear_tiles import LinearTile
from engine.kernels.moe_combine import combine_pairs
from engine.kernels.moe_gate import choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_route import max_tiles, route_pairs
from engine.kernels.moe_tiles import MoeTiles, OneTokenTiles, moe_tiles
from engine.kernels.rms_norm import add_rms_norm_
from engine.kernels.sampling import RowSampling, draw_tokens, greedy_tokens
from engine.layers.linear import Linear
from engine.moe.dispatch import LocalDispatcher
from engine.moe.expert_products import run_experts
from engine.moe.experts import Experts
from engine.moe.specialised import can_specialise

NUM_SETS = 3  # of inputs


@dataclass(frozen=True, slots=True)
class Row:
    kernel: str
    rows: int
    floor_s: float
    measured_s: float
    torch_s: float | None = None
    note: str = ""

    def fields(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    def line(self) -> str:
        torch_us = "" if self.torch_s is None else f"{self.torch_s * 1e6:.1f}"
        gap = self.measured_s / self.floor_s
        figures = f"{self.floor_s * 1e6:.1f} | {self.measured_s * 1e6:.1f} | {gap:.2f} | {torch_us}"
        return f"| {self.kernel} | {self.rows} | {figures} | {self.note}"


def norm_rows() -> list[Row]:
    rows = []
    weight = torch.rand(HIDDEN, device="cuda", dtype=torch.bfloat16)
    for num_rows in (1, 128, 8192):
        pairs = [
            [torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(NUM_SETS)
        ]
        ours = graph_time([lambda p=p: add_rms_norm_(*p, weight, 1e-6) for p in pairs], num_rounds=4)

        def by_torch(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
            x += delta
            return functional.rms_norm(x, (HIDDEN,), weight, 1e-6)

        plain = graph_time([lambda p=p: by_torch(*p) for p in pairs], num_rounds=4)
        rows.append(Row("add + norm", num_rows, 4 * num_rows * HIDDEN * 2 / BYTES_PER_S, ours, plain))
    x = torch.randn(8192, 2 * 10944, device="cuda", dtype=torch.bfloat16)
    ours = graph_time([lambda: gated_silu_rows(x)])
    up, gate = x.chunk(2, 1)
    plain = graph_time([lambda: up * functional.silu(gate)])
    rows.append(Row("silu * up", 8192, 1.5 * x.numel() * 2 / BYTES_PER_S, ours, plain))
    return rows


_FP8_TILES = (
    LinearTile(16, 16, 128, 4, 5),
    LinearTile(16, 32, 128, 4, 5),
    LinearTile(16, 64, 128, 4, 4),
    LinearTile(32, 32, 128, 4, 4),
    LinearTile(32, 64, 128, 4, 4),
    LinearTile(64, 64, 128, 4, 3),
    LinearTile(64, 64, 128, 4, 4, 8, False),
    LinearTile(64, 128, 128, 4, 4, 8, False),
    LinearTile(128, 64, 128, 4, 4, 8, False),
    LinearTile(128, 128, 128, 8, 3, 8, False),
    LinearTile(128, 128, 128, 8, 4, 8, False),
)


def dense_rows() -> list[Row]:
    rows: list[Row] = []
    for num_out in (2048, 3648, VOCAB):
        weight = [
            torch.randn(num_out, HIDDEN, device="cuda", dtype=torch.bfloat16) * HIDDEN**-0.5
            for _ in range(NUM_SETS)
        ]
        if num_out != VOCAB:
            quantised = [fp8.quantise(w, (128, 128)) for w in weight]
        for num_rows in (1, 2, 4, 8, 32, 128, 4096):
            if num_out == VOCAB and num_rows > 128:
                continue
            xs = [torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in weight]
            plain = graph_time(
                [lambda x=x, w=w: x @ w.t() for x, w in zip(xs, weight, strict=True)], num_rounds=4
            )
            rows += _few_rows(xs, weight, plain)
            if num_out != VOCAB:
                rows += _fp8_linear(xs, quantised, plain)
    return rows


def _best(time_of: Callable[[LinearTile], float], tiles: tuple[LinearTile, ...]) -> tuple[float, LinearTile]:
    found = []
    for tile in tiles:
        try:
            found.append((time_of(tile), tile))
        except Exception as error:  # noqa: BLE001 - a tile that does not fit the device is no answer
            print("skipped", tile, repr(error)[:100])
    return min(found, key=lambda pair: pair[0])


_FEW = [FewRowsTile(n, w) for n in (1, 2, 4, 8) for w in (1, 2, 4, 8) if n * 8 >= w]


def _few_rows(xs: list[torch.Tensor], weights: list[torch.Tensor], plain: float) -> Iterator[Row]:
    num_rows, num_out = xs[0].shape[0], weights[0].shape[0]
    if num_rows > MAX_ROWS:
        return
    out = torch.empty(num_rows, num_out, device="cuda", dtype=torch.bfloat16)
    pairs = list(zip(xs, weights, strict=True))
    found = []
    for tile in _FEW:
        calls = [lambda p=p, t=tile: multiply_few_rows(*p, out, t) for p in pairs]
        found.append((graph_time(calls, num_rounds=4), tile))
    ours, tile = min(found, key=lambda pair: pair[0])
    floor = 2 * (num_out * HIDDEN + num_rows * (HIDDEN + num_out)) / BYTES_PER_S
    yield Row(f"few rows {HIDDEN} -> {num_out}", num_rows, floor, ours, plain, str(tile))


def _fp8_linear(
    xs: list[torch.Tensor], weights: list[tuple[torch.Tensor, torch.Tensor]], plain: float
) -> Iterator[Row]:
    num_rows, num_out = xs[0].shape[0], weights[0][0].shape[0]
    num_bytes = num_out * HIDDEN + 2 * num_rows * (HIDDEN + num_out)
    floor = max(num_bytes / BYTES_PER_S, 2 * num_rows * num_out * HIDDEN / FP8_FLOPS_PER_S)

    def time_of(tile: LinearTile) -> float:
        pairs = list(zip(xs, weights, strict=True))
        return graph_time([lambda x=x, w=w: multiply_fp8(x, *w, tile) for x, w in pairs], num_rounds=4)

    tiles = tuple(t for t in _FP8_TILES if t.rows <= max(16, num_rows) and (t.rows > 16 or num_rows <= 64))
    ours, tile = _best(time_of, tiles)
    by_torch, note = _torch_fp8(xs, weights)
    yield Row(f"fp8 linear {HIDDEN} -> {num_out}", num_rows, floor, ours, by_torch or plain, f"{tile} {note}")


def _torch_fp8(
    xs: list[torch.Tensor], weights: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float | None, str]:
    """torch's block-scaled product of rows that are quantised already, where this torch has one."""
    try:
        kinds = functional.ScalingType
        rows = [quantise_rows(x) for x in xs]
        scales = [r.scales.t().contiguous().t() for r in rows]  # a column of scales lies together
        weight_scales = [s for _, s in weights]

        def call(i: int) -> torch.Tensor:
            return functional.scaled_mm(
                rows[i].values,
                weights[i][0].t(),
                scales[i],
                kinds.BlockWise1x128,
                weight_scales[i].t(),
                kinds.BlockWise128x128,
                output_dtype=torch.bfloat16,
            )

        exact = xs[0].double() @ fp8.dequantise(*weights[0], (128, 128), torch.float32).double().t()
        error = relative_error(call(0), exact)
        seconds = graph_time([lambda i=i: call(i) for i in range(len(xs))], num_rounds=4)
        return seconds, f"torch fp8 error {error:.3f}"
    except Exception as error:  # noqa: BLE001 - it is not in every version
        return None, f"torch fp8: {error!r}"[:160]


def sampling_rows() -> list[Row]:
    return [row for num_rows in (1, 32, 256) for row in _sampling(num_rows)]


_TRUNCATIONS = (("plain", (0, 1.0, 0.0)), ("top_p", (0, 0.9, 0.0)), ("top_k, top_p", (50, 0.9, 0.0)))


def _sampling(num_rows: int) -> Iterator[Row]:
    logits = [torch.randn(num_rows, VOCAB, device="cuda", dtype=torch.bfloat16) for _ in range(NUM_SETS)]
    out = torch.empty(num_rows, dtype=torch.int64, device="cuda")
    positions = torch.arange(num_rows, device="cuda")
    floor = 2 * num_rows * VOCAB / BYTES_PER_S
    plain = graph_time([lambda x=x: torch.argmax(x, 1) for x in logits], num_rounds=2)
    ours = graph_time([lambda x=x: greedy_tokens(x, out) for x in logits], num_rounds=2)
    yield Row("greedy", num_rows, floor, ours, plain)
    for name, limits in _TRUNCATIONS:
        sampling = row_sampling(num_rows, *limits)

        def call(x: torch.Tensor, sampling: RowSampling = sampling, name: str = name) -> None:
            draw_tokens(x, sampling, positions, out, is_truncated=name != "plain")

        ours = graph_time([lambda x=x, call=call: call(x) for x in logits], num_rounds=2)
        yield Row(f"draw {name}", num_rows, floor, ours)


def moe_rows(tuned: dict[bool, dict[int, MoeTiles]], formats: Sequence[bool]) -> list[Row]:
    rows: list[Row] = []
    for is_fp8 in formats:
        bench = MoeBench(is_fp8)
        for num_tokens in (1, 8, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096, 8192):
            rows += _moe(bench, num_tokens, tuned.get(is_fp8, {}).get(num_tokens))
        del bench
        torch.cuda.empty_cache()
    return rows


def _moe(bench: MoeBench, num_tokens: int, tuned: MoeTiles | None) -> Iterator[Row]:
    """As the engine computes it; with the tiles of the table where it does not use them; with tuned ones."""
    dtype = bench.sets[0].up_gate.dtype
    is_specialised = can_specialise(bench.sets[0], torch.bfloat16)
    tiles = moe_tiles(num_tokens, dtype, is_specialised=is_specialised)
    ways = {"": tiles, " by the table": moe_tiles(num_tokens, dtype), " tuned": tuned}
    if ways[" by the table"] == tiles:
        del ways[" by the table"]
    choices = [random_choice(num_tokens) for _ in bench.sets]
    xs = [torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in bench.sets]
    work = list(zip(xs, choices, bench.sets, strict=True))
    rounds = 2 if num_tokens <= 512 else 1
    name = "fp8" if bench.is_fp8 else "bf16"
    floor = floor_s(num_tokens, choices[0], bench.is_fp8)
    for way, cut in ways.items():
        if cut is None:
            continue
        calls = [lambda x=x, c=c, w=w, cut=cut: run_experts(x, c, SPEC, w, cut) for x, c, w in work]
        ours = graph_time(calls, num_rounds=rounds)
        plain = None
        if not bench.is_fp8 and num_tokens in (1, 128, 4096):
            plain = _plain_experts(bench, num_tokens, xs[0])
        yield Row(f"experts {name}{way}", num_tokens, floor, ours, plain)
    if bench.is_fp8:
        return
    gate = split_weight(torch.randn(NUM_EXPERTS, HIDDEN, device="cuda").bfloat16().float(), torch.bfloat16)
    state = new_gate_state(NUM_EXPERTS, "cuda")
    measured = graph_time(
        [lambda x=x: choose_experts_fused(x, gate, None, SPEC, state) for x in xs], num_rounds=4
    )
    row_bytes = 2 * num_tokens * HIDDEN
    yield Row("gate", num_tokens, (row_bytes + 2 * NUM_EXPERTS * HIDDEN) / BYTES_PER_S, measured)
    if choices[0].route is None and not isinstance(tiles, OneTokenTiles):
        num_tiles = max_tiles(num_tokens, TOP_K, NUM_SHARED, NUM_EXPERTS, tiles.rows)
        calls = [lambda c=c: route_pairs(c, num_tiles, tiles.rows) for c in choices]
        floor = 8 * num_tokens * SPEC.experts_per_token / BYTES_PER_S
        yield Row("route", num_tokens, floor, graph_time(calls, num_rounds=4))
    y = torch.randn(num_tokens * SPEC.experts_per_token, HIDDEN, device="cuda", dtype=torch.bfloat16)
    measured = graph_time([lambda c=c: combine_pairs(y, c.weights_TK) for c in choices], num_rounds=4)
    yield Row("combine", num_tokens, (1 + SPEC.experts_per_token) * row_bytes / BYTES_PER_S, measured)


def _plain_experts(bench: MoeBench, num_tokens: int, x: torch.Tensor) -> float:
    """The engine's own path without kernels: a loop over experts."""
    weights, choice = bench.sets[0], random_choice(num_tokens)
    linears = [[Linear(w) for w in stack] for stack in (weights.up_gate, weights.down)]
    experts, dispatcher = (
        Experts(linears[0], linears[1], weights.down.shape[2]),
        LocalDispatcher(len(linears[0])),
    )

    def call() -> torch.Tensor:
        routed = dispatcher.dispatch(x, choice.ids_TK.long())
        return dispatcher.combine(
            experts(routed.x_RD, routed.num_tokens_per_expert), choice.weights_TK, routed
        )

    return eager_time(call)
