"""Ways to multiply many rows by their experts, side by side on one Hopper device (DeepSeek-V2-Lite's shape):

    python -m benchmarks.gpu_moe_prefill [--tokens 512 1024 ...] [--only bf16 fp8]

Each way first runs in a process of its own, on few experts, against the float32 reference: that fills the
compiler's cache, and one that fails or hangs is left out. The others are checked again at full size, then
timed with today's tiles in the same run: sort, both products, weighted sum; replayed CUDA graphs over three
sets of weights, tokens and choices. Two passes of opposite order; the smaller median of a way counts.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu_moe import HIDDEN, SIZE, SPEC, MoeBench, floor_s, random_choice, random_weights
from benchmarks.gpu_timing import graph_time, relative_error
from engine.kernels.fp8_quantise import quantise_rows
from engine.kernels.moe_choice import Choice
from engine.kernels.moe_gate import GateSpec, choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_gather import gather_fp8_rows, gather_rows
from engine.kernels.moe_gemm import ExpertWeights, Tile, multiply_down, multiply_up_gate
from engine.kernels.moe_persistent import PersistentTile, PersistentTiles
from engine.kernels.moe_route import max_tiles, route_pairs
from engine.kernels.moe_specialised import (
    SpecialisedTile,
    SpecialisedTiles,
    multiply_down_specialised,
    multiply_up_gate_specialised,
)
from engine.kernels.moe_tiles import MoeTiles, moe_tiles
from engine.moe.fused_experts import run_experts, run_experts_reference

TOKENS = (512, 1024, 2048, 4096, 8192)
TOLERANCE = {False: 8e-3, True: 0.06}
SMALL_SPEC = replace(SPEC, num_experts=8)
SMALL_TOKENS = (70, 700, 1500)
CHECK_S = 100.0  # for all first runs together
STALL_S = 40.0  # without a line: a kernel hangs
Tiles = MoeTiles | PersistentTiles | SpecialisedTiles


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    is_fp8: bool
    tiles: Tiles | None  # None: today's


def specialised(name: str, is_fp8: bool, up: SpecialisedTile, down: SpecialisedTile | None = None) -> Way:
    return Way(f"specialised {name}", is_fp8, SpecialisedTiles(up, down or up))


def persistent(name: str, rows: int, tile: PersistentTile) -> Way:
    return Way(f"persistent {name}", False, PersistentTiles(rows, tile, tile))


def plain(name: str, is_fp8: bool, rows: int, up: Tile, down: Tile) -> Way:
    return Way(f"plain {name}", is_fp8, MoeTiles(rows, up, down, quantises_inside=False))


WAYS = (
    Way("today", False, None),
    specialised("128, group 4", False, SpecialisedTile(128, 4, 4)),
    specialised("128, group 8", False, SpecialisedTile(128, 4, 8)),
    specialised("128, group 16", False, SpecialisedTile(128, 4, 16)),
    specialised("128, group 32", False, SpecialisedTile(128, 4, 32)),
    specialised("64, group 8", False, SpecialisedTile(64, 6, 8)),
    persistent("128 x 256", 128, PersistentTile(128, 64, 8, 4, 8)),
    persistent("128 x 256, group 16", 128, PersistentTile(128, 64, 8, 4, 16)),
    persistent("128 x 256, 3 stages", 128, PersistentTile(128, 64, 8, 3, 8)),
    persistent("128 x 128, two", 128, PersistentTile(64, 64, 4, 3, 8, 2)),
    persistent("64 x 256", 64, PersistentTile(128, 64, 4, 4, 8)),
    persistent("64 x 256, two", 64, PersistentTile(128, 32, 4, 4, 8, 2)),
    plain("wide", False, 128, Tile(128, 64, 8, 4, 16, True), Tile(256, 64, 8, 4, 16, True)),
    Way("today", True, None),
    specialised("128, group 8", True, SpecialisedTile(128, 4, 8)),
    specialised("128, group 16", True, SpecialisedTile(128, 4, 16)),
    specialised("64, group 8", True, SpecialisedTile(64, 6, 8)),
    specialised("64, group 16", True, SpecialisedTile(64, 6, 16)),
    specialised("128 up, 64 down", True, SpecialisedTile(128, 4, 8), SpecialisedTile(64, 6, 8)),
    plain("128 x 64", True, 128, Tile(64, 128, 8, 4, 16, True), Tile(128, 128, 8, 4, 16, True)),
)


def run(way: Way, x: torch.Tensor, choice: Choice, spec: GateSpec, weights: ExpertWeights) -> torch.Tensor:
    tiles = way.tiles or moe_tiles(x.shape[0], weights.up_gate.dtype)
    return run_experts(x, choice, spec, weights, tiles)


def check(way: Way, x: torch.Tensor, choice: Choice, spec: GateSpec, weights: ExpertWeights) -> str:
    """What is wrong, if anything."""
    found, again = (run(way, x, choice, spec, weights) for _ in range(2))
    error = relative_error(found, run_experts_reference(x, choice, spec, weights))
    if not error <= TOLERANCE[way.is_fp8]:
        return f"error {error:.2e} at {x.shape[0]} tokens"
    if not torch.equal(found, again):
        return f"differs when repeated at {x.shape[0]} tokens"
    return ""


def small_choice(num_tokens: int) -> tuple[torch.Tensor, Choice]:
    """Few experts, one of them hardly chosen."""
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(SMALL_SPEC.num_experts, HIDDEN, device="cuda") * 0.03
    gate[0] *= 0.1
    split = split_weight(gate.bfloat16().float(), torch.bfloat16)
    state = new_gate_state(SMALL_SPEC.num_experts, "cuda")
    return x, choose_experts_fused(x, split, None, SMALL_SPEC, state)


def small_weights(is_fp8: bool) -> ExpertWeights:
    return random_weights(is_fp8, SMALL_SPEC.num_all_experts)


def first_run(way: Way, answer: Connection) -> None:
    """In a process of its own."""
    try:
        torch.manual_seed(1)
        weights = small_weights(way.is_fp8)
        problem = ""
        for num_tokens in SMALL_TOKENS:
            problem = problem or check(way, *small_choice(num_tokens), SMALL_SPEC, weights)
        answer.send(problem)
    except Exception as error:  # noqa: BLE001 - a way that does not compile is no answer
        answer.send(f"{type(error).__name__}: {str(error)[-250:]}")


def first_runs(ways: list[Way]) -> list[Way]:
    """Those that are right, of all run in parallel."""
    context, began = get_context("spawn"), time.monotonic()
    waiting: dict[Any, tuple[Way, BaseProcess]] = {}  # by the end of a pipe
    for way in ways:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=first_run, args=(way, sender))
        child.start()
        sender.close()
        waiting[receiver] = (way, child)
    good = []
    while waiting and time.monotonic() - began < CHECK_S:
        for ours in wait(list(waiting), timeout=1.0):
            way, process = waiting.pop(ours)
            problem = _received(ours)
            process.join(5.0)
            good += [] if problem else [way]
            if problem:
                print(f"LEFT OUT {label(way)}: {problem}", flush=True)
    for way, process in waiting.values():
        process.kill()
        print(f"LEFT OUT {label(way)}: no answer after {CHECK_S:.0f} s", flush=True)
    print(f"{len(good)} of {len(ways)} ways are right on few experts, {time.monotonic() - began:.0f} s")
    return [way for way in ways if way in good]


def _received(ours: Any) -> str:
    try:
        return str(ours.recv())
    except EOFError:
        return "the process died"


def label(way: Way) -> str:
    return f"{'fp8' if way.is_fp8 else 'bf16'} {way.name}"


class Watch:
    """Ends the program when nothing has been said for too long: a kernel that hangs cannot be stopped."""

    def __init__(self) -> None:
        self._doing, self._since = "", time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()

    def doing(self, what: str) -> None:
        self._doing, self._since = what, time.monotonic()

    def _look(self) -> None:
        while time.monotonic() - self._since < STALL_S:
            time.sleep(1.0)
        print(f"STALLED in {self._doing}", flush=True)
        os._exit(3)


Sample = tuple[torch.Tensor, Choice, ExpertWeights]


def compare(ways: list[Way], samples: list[Sample], watch: Watch) -> dict[str, float]:
    """Seconds of each way that is right at full size."""
    num_tokens = samples[0][0].shape[0]
    good = []
    for way in ways:
        watch.doing(f"check of {label(way)} at {num_tokens}")
        x, choice, weights = samples[0]
        problem = guarded(partial(check, way, x, choice, SPEC, weights))
        if problem:
            print(f"LEFT OUT {label(way)}: {problem}", flush=True)
        else:
            good.append(way)
    seconds: dict[str, float] = {}
    for way in good + good[::-1]:
        watch.doing(f"{label(way)} at {num_tokens}")
        calls = [partial(run, way, x, choice, SPEC, weights) for x, choice, weights in samples]
        took = graph_time(calls, num_replays=7)
        seconds[way.name] = min(took, seconds.get(way.name, took))
    return seconds


def guarded(call: Callable[[], str]) -> str:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - the others are compared all the same
        return f"{type(error).__name__}: {str(error)[-250:]}"


def flops(num_tokens: int) -> float:
    return 2 * num_tokens * SPEC.experts_per_token * 3 * SIZE * HIDDEN


def parts(way: Way, samples: list[Sample]) -> str:
    """Where the time of a way goes."""
    num_tokens = samples[0][0].shape[0]
    tiles = way.tiles or moe_tiles(num_tokens, samples[0][2].up_gate.dtype)
    num_tiles = max_tiles(num_tokens, SPEC.top_k, SPEC.num_shared, SPEC.num_experts, tiles.rows)
    routes = [route_pairs(choice, num_tiles, tiles.rows) for _, choice, _ in samples]
    num_pairs = num_tokens * SPEC.experts_per_token
    h = torch.randn(num_pairs, SIZE, device="cuda", dtype=torch.bfloat16)
    quantises = way.is_fp8 and not (isinstance(tiles, MoeTiles) and tiles.quantises_inside)
    xs = [quantise_rows(x) if quantises else x for x, _, _ in samples]
    rows = quantise_rows(h) if quantises else h
    found: dict[str, list[Callable[[], object]]] = {}
    calls: dict[str, Callable[[], object]]
    for x, route, (_, _, weights) in zip(xs, routes, samples, strict=True):
        if isinstance(tiles, SpecialisedTiles):
            gather: Callable[..., object] = gather_fp8_rows if quantises else gather_rows
            num_routed = num_tokens * SPEC.top_k
            calls = {
                "gather": partial(gather, x, route, num_routed, SPEC.experts_per_token),
                "gather + up_gate": partial(
                    multiply_up_gate_specialised, x, weights, route, SPEC, tiles.up_gate
                ),
                "down": partial(multiply_down_specialised, rows, weights, route, tiles.down),
            }
        elif isinstance(tiles, MoeTiles):
            calls = {
                "up_gate": partial(
                    multiply_up_gate, x, weights, route, SPEC.experts_per_token, tiles.up_gate
                ),
                "down": partial(multiply_down, rows, weights, route, tiles.down),
            }
        else:
            return ""
        for name, call in calls.items():
            found.setdefault(name, []).append(call)
    return ", ".join(f"{name} {graph_time(calls, num_replays=5) * 1e6:.0f}" for name, calls in found.items())


def libraries(samples: list[Sample]) -> str:
    """Products alone, without gathering, activation or weighted sum: torch's grouped ones, and the shared
    experts as dense ones."""
    x, _, weights = samples[0]
    num_tokens = x.shape[0]
    grouped = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    rows = x.repeat_interleave(SPEC.experts_per_token, 0)
    h = torch.randn(rows.shape[0], SIZE, device="cuda", dtype=torch.bfloat16)
    ends = [choice.counts_GE.sum(0).cumsum(0).int() for _, choice, _ in samples]
    calls: list[Callable[[], object]] = []
    for (_, _, w), offs in zip(samples, ends, strict=True):
        calls.append(partial(grouped, rows, w.up_gate.transpose(1, 2), offs=offs))
        calls.append(partial(grouped, h, w.down.transpose(1, 2), offs=offs))
    both = 2 * graph_time(calls, num_replays=5)
    up_gate = weights.up_gate[-SPEC.num_shared :].flatten(0, 1)
    down = weights.down[-SPEC.num_shared :].transpose(0, 1).flatten(1).contiguous()
    wide = torch.randn(num_tokens, down.shape[1], device="cuda", dtype=torch.bfloat16)
    dense = 2 * graph_time([lambda: x @ up_gate.t(), lambda: wide @ down.t()], num_replays=5, num_rounds=3)
    share = flops(num_tokens) * SPEC.num_shared / SPEC.experts_per_token
    return (
        f"torch grouped_mm {both * 1e6:.0f} us ({flops(num_tokens) / both / 1e12:.0f} TFLOP/s), "
        f"shared by cuBLAS {dense * 1e6:.0f} us ({share / dense / 1e12:.0f} TFLOP/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_moe_prefill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--only", nargs="+", choices=("bf16", "fp8"), default=("bf16", "fp8"))
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    ways = first_runs([way for way in WAYS if ("fp8" if way.is_fp8 else "bf16") in args.only])
    torch.manual_seed(0)
    watch, summary = Watch(), []
    for is_fp8 in (False, True):
        mine = [way for way in ways if way.is_fp8 == is_fp8]
        if mine:
            watch.doing("weights")
            summary += measure(mine, MoeBench(is_fp8), args.tokens, watch)
            torch.cuda.empty_cache()
    print("\n".join(summary), flush=True)


def measure(ways: list[Way], bench: MoeBench, tokens: list[int], watch: Watch) -> list[str]:
    """Prints all ways, gives the winners."""
    kind, summary = "fp8" if bench.is_fp8 else "bf16", []
    for num_tokens in tokens:
        samples = []
        for weights in bench.sets:
            x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
            samples.append((x, random_choice(num_tokens), weights))
        seconds = compare(ways, samples, watch)
        floor = floor_s(num_tokens, samples[0][1], bench.is_fp8)
        print(f"{kind} {num_tokens} tokens, floor {floor * 1e6:.0f} us")
        for name, took in sorted(seconds.items(), key=lambda item: item[1]):
            print(
                f"  {took * 1e6:7.0f} us {flops(num_tokens) / took / 1e12:5.0f} TFLOP/s  {name}", flush=True
            )
        best = min(seconds, key=seconds.__getitem__)
        today = seconds.get("today", float("nan"))
        summary.append(
            f"{kind} {num_tokens}: {best} {seconds[best] * 1e6:.0f} us, "
            f"{flops(num_tokens) / seconds[best] / 1e12:.0f} TFLOP/s; today {today * 1e6:.0f} us"
        )
        if num_tokens in (1024, 4096):
            watch.doing(f"parts at {num_tokens}")
            for way in ways:
                if way.name in ("today", best) or way.name == "specialised 128, group 8":
                    print(f"  parts of {way.name}: {guarded(partial(parts, way, samples))}", flush=True)
            if not bench.is_fp8:
                print(f"  {guarded(partial(libraries, samples))}", flush=True)
    return summary


if __name__ == "__main__":
    main()
