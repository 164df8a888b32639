"""One decode step of DeepSeek-V2-Lite's shape as a CUDA graph, and which ways to shorten it are worth it.

    python -m benchmarks.gpu_decode_step [--layers 27] [--rows 1 2 4 8] [--context 1100]

Checks first: against the plain layers in float32, and that overlapping launches change no bit, replay after
replay. Then, for each number of rows, group after group of ways, the fastest of each on top of those chosen
before; for one row a table by kernel. Random weights; kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_shape import write_shape
from benchmarks.gpu_timing import relative_error
from engine.attention.device_plan import plan_on_device
from engine.checkpoint.model_config import ModelConfig, load_model_config
from engine.checkpoint.weights import WeightSource, open_weights
from engine.forward_batch import ForwardBatch
from engine.kernels import attention_decode, moe_tiles
from engine.kernels.attention_decode import DecodeTuning
from engine.kernels.moe_gemm import Tile
from engine.kernels.moe_tiles import MoeTiles
from engine.kernels.sampling import greedy_tokens
from engine.kernels.step_switches import SWITCHES, StepSwitches
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models.build import build_model
from engine.models.causal_lm import CausalLM

BLOCK_SIZE, NUM_REPLAYS = 16, 8


@dataclass(frozen=True)
class Combination:
    """Switches that differ from their defaults, and how experts and attention are cut."""

    switches: dict[str, Any]
    up: Tile
    down: Tile
    attention: DecodeTuning = attention_decode.FEW_TUNING

    def with_(self, changes: dict[str, Any]) -> Combination:
        cuts = {name: value for name, value in changes.items() if name in ("up", "down", "attention")}
        rest = {name: value for name, value in changes.items() if name not in cuts}
        return replace(self, switches=self.switches | rest, **cuts)

    def apply(self) -> None:
        for name, value in {**_DEFAULTS, **self.switches}.items():
            setattr(SWITCHES, name, value)
        attention_decode.FEW_TUNING = self.attention
        moe_tiles._BF16 = {1 << 40: MoeTiles(16, self.up, self.down)}


Option = tuple[str, dict[str, Any]]
Groups = dict[str, list[Option]]
_DEFAULTS = {name: getattr(StepSwitches(), name) for name in StepSwitches.__slots__}
_ONE = Combination({}, Tile(32, 128, 4, 3), Tile(64, 128, 4, 3))
_MORE = Combination({}, Tile(128, 128, 4, 3, is_bulk=True), Tile(64, 128, 4, 4, is_bulk=True))
_OFF = {"dependent_rows": 0, "joins_gate": 0, "joins_combine": False, "joins_attention": 0, "few_rows": 2}
_FEW = {"few_up": (2, 4), "few_down": (4, 4)}


def base(num_rows: int) -> Combination:
    return _ONE if num_rows == 1 else _MORE


def before(num_rows: int) -> Combination:
    return base(num_rows).with_(_OFF)


def _tiles(product: str, *cuts: tuple[int, int, int, str]) -> list[Option]:
    """Cuts: columns, depth, stages, and "bulk" or nothing."""
    return [
        (
            f"{columns}x{depth} {stages} {kind}".rstrip(),
            {product: Tile(columns, depth, 4, stages, is_bulk=kind == "bulk"), f"few_{product}": None}
            | ({"sums_down": 0} if product == "down" else {}),
        )
        for columns, depth, stages, kind in cuts
    ]


def _few(switch: str, *cuts: tuple[int, int]) -> list[Option]:
    """Cuts: outputs and warps of a program."""
    also = {"sums_down": 0} if switch == "few_down" else {}
    return [(f"few {outputs} x {warps}", {switch: (outputs, warps)} | also) for outputs, warps in cuts]


def groups(num_rows: int) -> Groups:
    """What to choose among, one after another, each on top of the choices before."""
    if num_rows == 8:
        up = _tiles("up", (128, 128, 3, "bulk"), (128, 128, 3, ""), (64, 128, 4, "bulk"), (64, 128, 4, ""))
        down = _tiles("down", (64, 128, 4, "bulk"), (64, 128, 4, ""), (128, 128, 3, "bulk"))
        return {
            "dependent": [("to 32", {"dependent_rows": 32}), ("no", {"dependent_rows": 0})],
            "combine": [("joined", {"joins_combine": True}), ("apart", {"joins_combine": False})],
            "attention": [("apart", {"joins_attention": 0}), ("joined", {"joins_attention": 8})],
            "gate": [("apart", {"joins_gate": 0}), ("4 x 8", _gate(4, 8, 8)), ("8 x 8", _gate(8, 8, 8))],
            "up": up,
            "down": down,
        }
    up = _tiles(
        "up",
        (32, 128, 3, ""),
        (32, 128, 4, ""),
        (32, 128, 4, "bulk"),
        (32, 128, 5, ""),
        (16, 128, 4, ""),
        (64, 128, 4, "bulk"),
        (128, 128, 3, "bulk"),
    )
    down = _tiles(
        "down",
        (64, 128, 3, ""),
        (64, 128, 4, ""),
        (64, 128, 4, "bulk"),
        (32, 128, 4, ""),
        (32, 128, 4, "bulk"),
    )
    found: Groups = {
        "gate": [
            ("apart", {"joins_gate": 0}),
            *((f"{e} x {w}", _gate(e, w)) for e, w in ((4, 4), (4, 2), (8, 4), (2, 4))),
        ],
        "up": up + _few("few_up", (2, 4), (4, 4), (1, 2)),
        "down": down + _few("few_down", (4, 4), (2, 4), (4, 8)),
    }
    if num_rows <= 2:
        found["up"] += _few("few_up", (4, 8), (1, 4), (2, 2), (8, 8))
        found["down"] += _few("few_down", (8, 8), (1, 2), (2, 2), (1, 4))
        found["linear"] = _few("few_tile", (2, 4), (4, 4), (4, 8), (1, 4), (1, 2), (2, 2), (2, 8))
    else:
        found["linear"] = [("few 4", {"few_rows": 4}), ("cuBLAS", {"few_rows": 2})]
    if num_rows == 1:
        found["down"] += [(f"sum {warps}", {"sums_down": warps}) for warps in (4, 8)]
    found["shared"] = [("early", {"early_shared": True}), ("late", {"early_shared": False})]
    found["combine"] = [("joined", {"joins_combine": True}), ("apart", {"joins_combine": False})]
    found["attention"] = [
        ("32x4x2", _attention(32, 4, 2)),
        ("16x8x1", _attention(16, 8, 1)),
        ("32x8x1", _attention(32, 8, 1)),
        ("apart", {"joins_attention": 0}),
    ]
    found["dependent"] = [("to 32", {"dependent_rows": 32}), ("no", {"dependent_rows": 0})]
    return found


def _gate(experts: int, warps: int, most: int = 4) -> dict[str, Any]:
    return {"joins_gate": most, "gate_experts": experts, "gate_warps": warps}


def _attention(num_rows: int, num_warps: int, num_stages: int) -> dict[str, Any]:
    return {"joins_attention": 4, "attention": DecodeTuning(num_rows, num_warps, num_stages, 16, 64)}


class Float32(WeightSource):
    """What another source has, rounded as there, in float32."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._source.get(name, shape, torch.bfloat16).float()

    def has(self, name: str) -> bool:
        return self._source.has(name)


class Step:
    """A step of so many rows whose contexts are as long, over blocks in random order."""

    def __init__(self, model: CausalLM, cache: KvCache, num_rows: int, context: int) -> None:
        self._model, self._cache = model, cache
        width = -(-context // BLOCK_SIZE)
        generator = torch.Generator().manual_seed(num_rows)
        tables = torch.randperm(cache.num_blocks, generator=generator)[: num_rows * width].view(
            num_rows, width
        )
        last = context - 1
        slots = tables[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
        self.batch = ForwardBatch(
            token_ids_T=torch.randint(model.vocab_size, (num_rows,), generator=generator).cuda(),
            positions_T=torch.full((num_rows,), last, device="cuda"),
            slot_mapping_T=slots.cuda(),
            num_decodes=num_rows,
            query_start=list(range(num_rows + 1)),
            context_len=[context] * num_rows,
            block_tables=tables.tolist(),
            logits_rows_N=torch.empty(0, dtype=torch.int64),
        )
        self.on_device = replace(self.batch, device_plan=plan_on_device(self.batch, BLOCK_SIZE))
        self.logits = torch.empty(num_rows, model.vocab_size, dtype=cache.data.dtype, device="cuda")
        self.next = torch.empty(num_rows, dtype=torch.int64, device="cuda")

    @torch.inference_mode()
    def __call__(self) -> None:
        self._model.logits_into(self.logits, self._model.forward(self.on_device, self._cache))
        greedy_tokens(self.logits, self.next)

    @torch.inference_mode()
    def plainly(self) -> torch.Tensor:
        """Logits, by layers without kernels."""
        return self._model.logits(self._model.forward(self.batch, self._cache))

    def graph(self, combination: Combination) -> torch.cuda.CUDAGraph:
        combination.apply()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self()
        return graph


def _shape(num_layers: int) -> ModelConfig:
    directory = Path(tempfile.mkdtemp())
    return load_model_config(write_shape(directory, num_hidden_layers=num_layers))


def _model(config: ModelConfig, *, is_exact: bool = False) -> CausalLM:
    with open_weights(Path(), "dummy", torch.bfloat16, config) as weights:
        if is_exact:
            weights.move_to("cuda")  # type: ignore[attr-defined]
            return build_model(config, Float32(weights), None, torch.float32, "cuda", uses_kernels=False)
        return build_model(config, weights, None, torch.bfloat16, "cuda")


def _cache(config: ModelConfig, num_tokens: int, dtype: str = "bfloat16") -> KvCache:
    layout = KvLayout(
        model_fingerprint="step",
        num_layers=config.num_layers,
        token_shape=config.kv_token_shape,
        dtype=dtype,
        block_size=BLOCK_SIZE,
    )
    return KvCache(layout, num_tokens // BLOCK_SIZE + 2, device="cuda")


def _fill(cache: KvCache) -> None:
    for layer in cache.data.unbind():
        layer.normal_()


def graph_times(graphs: list[torch.cuda.CUDAGraph], num_rounds: int = 3) -> list[float]:
    """Microseconds of a replay of each: the lowest median of rounds in which all take turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(num_rounds):
        for graph, found in zip(graphs, times, strict=True):
            graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_REPLAYS + 1)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            torch.cuda.synchronize()
            steps = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
            found.append(median(steps) * 1e3)
    return [min(found) for found in times]


# --- compiling


@cache
def _small(*, is_exact: bool = False) -> CausalLM:
    """Two layers: a dense one and one of experts."""
    return _model(_shape(2), is_exact=is_exact)


@cache
def _small_cache() -> KvCache:
    return _cache(_shape(2), 256 * 64)


def _compile(work: tuple[int, str, Combination]) -> str | None:
    """In a process of its own: fills the compiler's cache on disk."""
    num_rows, name, combination = work
    try:
        combination.apply()
        Step(_small(), _small_cache(), num_rows, 40)()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - what does not compile is no result
        return f"{name} at {num_rows}: {type(error).__name__} {str(error)[-120:]}"
    return None


def compile_all(rows: list[int], num_processes: int) -> None:
    began = time.monotonic()
    work = [(num_rows, "before", before(num_rows)) for num_rows in rows]
    for num_rows in rows:
        for group, options in groups(num_rows).items():
            for name, changes in options:
                # Matrix units see tiles of 16 rows, whatever the number of tokens.
                if num_rows == rows[0] or num_rows == 8 or not {"up", "down"} & set(changes):
                    also = _FEW if group == "shared" else {}
                    work.append((num_rows, f"{group} {name}", base(num_rows).with_(also | changes)))
    random.Random(0).shuffle(work)  # or all compile the same at the same time
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        failed = [text for text in pool.map(_compile, work) if text]
    print(f"{len(work)} combinations compiled in {time.monotonic() - began:.0f} s", flush=True)
    for text in failed[:6]:
        print("  " + " ".join(text.split())[:200])


# --- checks


def check(num_rows: int, context: int) -> str:
    """On a model of two layers, in float32 without kernels and in bfloat16, with the same rows cached."""
    config = _shape(2)
    exact_cache = _cache(config, num_rows * (context + BLOCK_SIZE), "float32")
    _fill(exact_cache)
    exact_cache.data.copy_(exact_cache.data.bfloat16())
    cache = _cache(config, num_rows * (context + BLOCK_SIZE))
    cache.data.copy_(exact_cache.data)
    expected = Step(_small(is_exact=True), exact_cache, num_rows, context).plainly()
    step = Step(_small(), cache, num_rows, context)
    few = base(num_rows).with_(_FEW)
    compared = {"before": before(num_rows), "base": base(num_rows), "few": few}
    compared["few, no overlap"] = few.with_({"dependent_rows": 0})
    if num_rows == 1:
        compared["sum"] = few.with_({"sums_down": 8})
        compared["sum, no overlap"] = few.with_({"sums_down": 8, "dependent_rows": 0})
    bits: dict[str, torch.Tensor] = {}
    texts = []
    for name, combination in compared.items():
        graph = step.graph(combination)
        step.logits.fill_(float("nan"))
        graph.replay()
        bits[name] = step.logits.clone()
        changed = 0
        for _ in range(50):
            graph.replay()
            changed += int(not torch.equal(step.logits, bits[name]))
        text = f"{name} {relative_error(bits[name], expected):.4f}"
        texts.append(text + (f" ({changed} of 50 replays differ)" if changed else ""))
    equal = [torch.equal(bits[name], bits[f"{name}, no overlap"]) for name in ("few", "sum") if name in bits]
    return f"{num_rows} rows, error: {'; '.join(texts)}; same bits without overlap: {equal}"


# --- tables


def descend(model: CausalLM, cache: KvCache, num_rows: int, context: int) -> Combination:
    """Takes the fastest of each group on top of those taken before; then once more among the best three."""
    step = Step(model, cache, num_rows, context)
    best, remaining = base(num_rows), groups(num_rows)
    for turn in range(2):
        for group, options in remaining.items():
            tried: list[tuple[float, int]] = []
            graphs: dict[int, torch.cuda.CUDAGraph] = {}
            for i, (_, changes) in enumerate(options):
                with suppress(Exception):  # what does not fit the device is no result
                    graphs[i] = step.graph(best.with_(changes))
            tried = sorted(zip(graph_times(list(graphs.values())), graphs, strict=True))
            if not tried:
                continue
            fastest, winner = tried[0]
            best = best.with_(options[winner][1])
            remaining[group] = [options[i] for _, i in tried[:3]]
            text = "; ".join(f"{options[i][0]} {time - fastest:+.0f}" for time, i in tried[:8])
            if turn == 0:
                print(f"  {group}: {fastest:.0f} us {text}", flush=True)
    chosen = {group: options[0][0] for group, options in remaining.items()}
    graphs_of = [step.graph(c) for c in (before(num_rows), base(num_rows), best)]
    times = graph_times(graphs_of, 5)
    print(
        f"{num_rows} rows of {context}: before {times[0]:.0f} us, base {times[1]:.0f}, best {times[2]:.0f}:"
        f" {chosen}",
        flush=True,
    )
    return best


def profile(model: CausalLM, cache: KvCache, context: int, combination: Combination) -> None:
    """By kernel, microseconds; those that overlap count twice."""
    graph = Step(model, cache, 1, context).graph(combination)
    num_steps = 5
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            graph.replay()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    rows = [row for row in rows if row.self_device_time_total]
    total = sum(row.self_device_time_total for row in rows) / num_steps
    print(f"best by kernel, 1 row of {context}: {total:.0f} us; launches a step x us = us a step")
    for row in rows[:11]:
        each, count = row.self_device_time_total / row.count, row.count / num_steps
        print(f"  {row.key[:56]:56} {count:5.0f} x {each:6.2f} = {count * each:6.0f}")


def attempt(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - one part that fails must not cost the others
        print(f"{type(error).__name__}: {str(error)[-300:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--limit", type=int, default=210, help="seconds after which it gives up")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.limit, exit=True)
    began = time.monotonic()
    print(torch.cuda.get_device_name(), torch.__version__)
    compile_all(args.rows, args.processes)
    for num_rows in (1, 2):
        attempt(lambda n=num_rows: print(check(n, args.context), flush=True))
    _small.cache_clear()
    torch.cuda.empty_cache()
    config = _shape(args.layers)
    model = _model(config)
    cache = _cache(config, max(args.rows) * (args.context + BLOCK_SIZE))
    _fill(cache)
    print(f"{time.monotonic() - began:.0f} s until the descent", flush=True)
    best: dict[int, Combination] = {}
    for num_rows in args.rows:
        attempt(lambda n=num_rows: best.update({n: descend(model, cache, n, args.context)}))
    if 1 in best:
        attempt(lambda: profile(model, cache, args.context, best[1]))
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
