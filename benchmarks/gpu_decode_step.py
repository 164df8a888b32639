"""One decode step of DeepSeek-V2-Lite's shape as a CUDA graph, with and without each way to shorten it.

    python -m benchmarks.gpu_decode_step [--layers 27] [--rows 1 2 4 8 32 256] [--context 1100]

Checks first: against the plain layers in float32, and that overlapping launches change no bit, replay after
replay. Then microseconds a step for each combination of switches, and for one row a table by kernel.
Random weights; kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
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
from engine.kernels.few_rows import multiply_few_rows
from engine.kernels.moe_gemm import Tile
from engine.kernels.moe_tiles import MoeTiles
from engine.kernels.sampling import greedy_tokens
from engine.kernels.step_switches import SWITCHES, StepSwitches
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models.build import build_model
from engine.models.causal_lm import CausalLM

BLOCK_SIZE, NUM_REPLAYS, FEW = 16, 24, (1, 2, 4, 8)


@dataclass(frozen=True)
class Variant:
    name: str
    switches: dict[str, Any] = field(default_factory=dict)
    tuning: DecodeTuning = attention_decode.FEW_TUNING
    tiles: MoeTiles | None = None  # of the experts, for all sizes

    def apply(self) -> None:
        for name, value in {**_fields(StepSwitches()), **self.switches}.items():
            setattr(SWITCHES, name, value)
        attention_decode.FEW_TUNING = self.tuning
        moe_tiles._BF16 = dict(_TILES) if self.tiles is None else {1 << 40: self.tiles}


_TILES = dict(moe_tiles._BF16)
_OFF: dict[str, Any] = {
    "dependent_rows": 0,
    "joins_gate": False,
    "joins_combine": False,
    "joins_attention": False,
    "prefetches_down": False,
    "fetched_shared": 0,
    "few_rows": 2,
    "tile_rows": 0,
}
BEFORE, AFTER = Variant("before", _OFF), Variant("all")


def _fields(switches: StepSwitches) -> dict[str, Any]:
    return {name: getattr(switches, name) for name in StepSwitches.__slots__}


def _only(*names: str) -> dict[str, Any]:
    return _OFF | {name: getattr(StepSwitches(), name) for name in names}


def _without(name: str) -> Variant:
    return Variant(f"all but {name}", {name: _OFF[name]})


_JOINS = ("joins_gate", "joins_combine", "joins_attention")
SWITCHED = [
    BEFORE,
    Variant("only dependent", _only("dependent_rows")),
    Variant("only joins", _only(*_JOINS)),
    Variant("dependent + joins", _only("dependent_rows", *_JOINS)),
    AFTER,
    *map(_without, ("dependent_rows", *_JOINS, "prefetches_down", "fetched_shared")),
    Variant("shared 3 Mi", {"fetched_shared": 3}),
    Variant("shared 11 Mi", {"fetched_shared": 11}),
]
LINEARS = [
    Variant(f"few {few}, tiles {tile}", {"few_rows": few, "tile_rows": tile})
    for few, tile in ((2, 0), (2, 8), (4, 0), (1, 8))
]
SHARES = [
    Variant(
        f"attention {rows}x{warps}x{stages}, {most} shares", {}, DecodeTuning(rows, warps, stages, 16, most)
    )
    for rows, warps, stages, most in (
        (32, 4, 2, 32),
        (32, 4, 1, 64),
        (32, 8, 2, 64),
        (16, 4, 2, 64),
        (16, 8, 1, 64),
        (64, 4, 1, 32),
        (64, 8, 1, 32),
    )
]
_UPS = (
    Tile(32, 128, 4, 3),
    Tile(32, 128, 4, 4),
    Tile(64, 128, 4, 3),
    Tile(16, 256, 4, 3),
    Tile(32, 256, 4, 2),
)
_DOWNS = (
    Tile(64, 128, 4, 3),
    Tile(32, 128, 4, 4),
    Tile(64, 128, 4, 4),
    Tile(32, 128, 4, 3),
    Tile(16, 128, 4, 5),
)
_BULK = (Tile(128, 128, 4, 3, is_bulk=True), Tile(64, 128, 4, 4, is_bulk=True))
EXPERTS = [
    *(
        Variant(f"up {t.columns}x{t.depth} {t.num_stages}", {}, tiles=MoeTiles(16, t, _DOWNS[0]))
        for t in _UPS[1:]
    ),
    *(
        Variant(f"down {t.columns}x{t.depth} {t.num_stages}", {}, tiles=MoeTiles(16, _UPS[0], t))
        for t in _DOWNS[1:]
    ),
    Variant("both bulk", {}, tiles=MoeTiles(16, *_BULK)),
    Variant("neither bulk", {}, tiles=MoeTiles(16, _UPS[0], _DOWNS[0])),
    Variant("up 64 bulk", {}, tiles=MoeTiles(16, replace(_UPS[2], is_bulk=True), _BULK[1])),
]
GATES = [
    Variant(f"gate {experts} x {warps}", {"gate_experts": experts, "gate_warps": warps})
    for experts, warps in ((1, 1), (1, 2), (1, 4), (2, 2), (2, 8), (4, 4))
]
LARGE = [BEFORE, AFTER, Variant("all, dependent to 256", {"dependent_rows": 256})]


def variants(num_rows: int) -> list[Variant]:
    if num_rows > max(FEW):
        return LARGE
    found = [*SWITCHED]
    if num_rows > 1:
        found += LINEARS
    if num_rows in (1, 8):
        found += SHARES + (GATES if num_rows == 1 else GATES[-2:])
    if num_rows in (1, 4, 8):
        found += EXPERTS
    return found


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

    def graph(self, variant: Variant) -> torch.cuda.CUDAGraph:
        variant.apply()
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


def graph_time(graph: torch.cuda.CUDAGraph) -> float:
    """Median microseconds of a replay."""
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) * 1e3


# --- compiling


@cache
def _small(*, is_exact: bool = False) -> CausalLM:
    """Two layers: a dense one and one of experts."""
    return _model(_shape(2), is_exact=is_exact)


@cache
def _small_cache() -> KvCache:
    return _cache(_shape(2), 256 * 64)


def _compile(work: tuple[int, Variant]) -> str | None:
    """In a process of its own: fills the compiler's cache on disk."""
    num_rows, variant = work
    try:
        variant.apply()
        Step(_small(), _small_cache(), num_rows, 40)()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - what does not compile is no result
        return f"{variant.name} at {num_rows}: {type(error).__name__} {str(error)[-160:]}"
    return None


def compile_all(rows: list[int], num_processes: int) -> None:
    began = time.monotonic()
    work = [(num_rows, variant) for num_rows in rows for variant in variants(num_rows)]
    random.Random(0).shuffle(work)  # or all compile the same at the same time
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        failed = [text for text in pool.map(_compile, work) if text]
    print(
        f"{len(work)} combinations compiled in {time.monotonic() - began:.0f} s",
        *failed,
        sep="\n  ",
        flush=True,
    )


# --- checks


def check(num_rows: int, context: int) -> Iterator[str]:
    """On a model of two layers, in float32 without kernels and in bfloat16, with the same rows cached."""
    config = _shape(2)
    exact_cache = _cache(config, num_rows * (context + BLOCK_SIZE), "float32")
    _fill(exact_cache)
    exact_cache.data.copy_(exact_cache.data.bfloat16())
    cache = _cache(config, num_rows * (context + BLOCK_SIZE))
    cache.data.copy_(exact_cache.data)
    expected = Step(_small(is_exact=True), exact_cache, num_rows, context).plainly()
    step = Step(_small(), cache, num_rows, context)
    bits: dict[str, torch.Tensor] = {}
    for variant in (BEFORE, *SWITCHED[1:6]):
        graph = step.graph(variant)
        step.logits.fill_(float("nan"))
        graph.replay()
        first = step.logits.clone()
        changed = 0
        for _ in range(50):
            graph.replay()
            changed += int(not torch.equal(step.logits, first))
        bits[variant.name] = first
        error = relative_error(first, expected)
        same = int((first.argmax(1) == expected.argmax(1)).sum())
        repeats = f"{changed} of 50 replays differ"
        yield f"{num_rows} rows, {variant.name}: error {error:.4f}, {same} tokens same, {repeats}"
    pairs = (
        ("before", "only dependent"),
        ("only joins", "dependent + joins"),
        ("all", "all but dependent_rows"),
    )
    for a, b in pairs:
        yield f"{num_rows} rows, {a} and {b} equal: {torch.equal(bits[a], bits[b])}"


def check_capture(name: str) -> str:
    """Whether a dependent launch may follow a node of a graph that is no kernel."""
    AFTER.apply()
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    expected = multiply_few_rows(multiply_few_rows(x, weight), weight)
    graph, event, stream = torch.cuda.CUDAGraph(), torch.cuda.Event(external=True), torch.cuda.Stream()
    nodes = {"an event": event.record, "a copy": lambda: x.clone(), "a fill": lambda: x.new_empty(64).zero_()}
    with torch.cuda.graph(graph, stream=stream):
        between = multiply_few_rows(x, weight)
        nodes[name]()
        found = multiply_few_rows(between, weight)
    graph.replay()
    return f"dependent launch behind {name} in a graph: {torch.equal(found, expected)}"


# --- tables


def time_variants(model: CausalLM, cache: KvCache, num_rows: int, context: int) -> None:
    step = Step(model, cache, num_rows, context)
    found: list[tuple[float, str]] = []
    for variant in (*variants(num_rows), Variant("all, again"), Variant("before, again", _OFF)):
        try:
            found.append((graph_time(step.graph(variant)), variant.name))
        except Exception as error:  # noqa: BLE001 - what does not fit the device is no result
            print(f"  {variant.name}: {type(error).__name__} {str(error)[-120:]}")
    times = {name: seconds for seconds, name in found}
    before, after = times.get("before", float("nan")), times.get("all", float("nan"))
    print(f"\n{num_rows} rows of {context}: before {before:.0f} us, all {after:.0f}; difference to all:")
    print("  " + "; ".join(f"{name} {seconds - after:+.0f}" for seconds, name in sorted(found)))
    print(f"  fastest: {min(found)[1]}", flush=True)


def profile(model: CausalLM, cache: KvCache, context: int, variant: Variant) -> None:
    """By kernel, microseconds; those that overlap count twice."""
    graph = Step(model, cache, 1, context).graph(variant)
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
    print(
        f"\nby kernel, 1 row of {context}, {variant.name}: {total:.0f} us; launches a step x us = us a step"
    )
    for row in rows[:18]:
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
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 256])
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    parser.add_argument("--limit", type=int, default=330, help="seconds after which it gives up")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.limit, exit=True)
    began = time.monotonic()
    print(torch.cuda.get_device_name(), torch.__version__)
    compile_all(args.rows, args.processes)
    for node in ("a copy", "a fill", "an event"):
        attempt(lambda n=node: print(check_capture(n), flush=True))
    for num_rows in (1, 3, 8):
        attempt(lambda n=num_rows: [print(line, flush=True) for line in check(n, args.context)])
    _small.cache_clear()
    torch.cuda.empty_cache()
    loading = time.monotonic()
    config = _shape(args.layers)
    model = _model(config)
    cache = _cache(config, max(4100, max(args.rows) * (args.context + BLOCK_SIZE)))
    _fill(cache)
    print(f"model of {args.layers} layers in {time.monotonic() - loading:.0f} s", flush=True)
    for variant in (BEFORE, AFTER):
        attempt(lambda v=variant: profile(model, cache, args.context, v))
    for num_rows in args.rows:
        attempt(lambda n=num_rows: time_variants(model, cache, n, args.context))
    attempt(lambda: time_variants(model, cache, 1, 4000))
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
