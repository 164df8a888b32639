"""One decode step of DeepSeek-V2-Lite's shape as a CUDA graph, by number of rows.

    python -m benchmarks.gpu_decode_step [--layers 27] [--context 1100]

Checks first, on two layers: the error against plain layers in float32, and that overlapping launches change
no bit, replay after replay. Then the time of a step with and without overlap, and a table by kernel for one
row. Random weights; kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.gpu_shape import write_shape
from benchmarks.gpu_timing import relative_error
from engine.attention.device_plan import plan_on_device
from engine.checkpoint.model_config import ModelConfig, load_model_config
from engine.checkpoint.weights import WeightSource, open_weights
from engine.forward_batch import ForwardBatch
from engine.kernels import dependent_launch
from engine.kernels.sampling import greedy_tokens
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models.build import build_model
from engine.models.causal_lm import CausalLM

ROWS = (1, 2, 4, 8, 32, 256)
BLOCK_SIZE, NUM_REPLAYS = 16, 8


@contextmanager
def overlapping(does_overlap: bool) -> Iterator[None]:
    """Launches made in it, of small steps, overlap or do not."""
    with patch.object(dependent_launch, "MAX_ROWS", dependent_launch.MAX_ROWS if does_overlap else 0):
        yield


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

    def graph(self, *, overlaps: bool) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with overlapping(overlaps):
            with torch.cuda.stream(stream):
                self()
            torch.cuda.current_stream().wait_stream(stream)
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


@cache
def _small(*, is_exact: bool = False) -> CausalLM:
    """Two layers: a dense one and one of experts."""
    return _model(_shape(2), is_exact=is_exact)


@cache
def _small_cache() -> KvCache:
    return _cache(_shape(2), 256 * 64)


def _ways(num_rows: int) -> list[bool]:
    """Whether launches overlap."""
    return [True, False] if num_rows <= dependent_launch.MAX_ROWS else [False]


def _compile(work: tuple[int, bool]) -> None:
    """In a process of its own: fills the compiler's cache on disk."""
    num_rows, overlaps = work
    with overlapping(overlaps):
        Step(_small(), _small_cache(), num_rows, 40)()
    torch.cuda.synchronize()


def compile_all(num_processes: int) -> None:
    began = time.monotonic()
    work = [(num_rows, overlaps) for num_rows in ROWS for overlaps in _ways(num_rows)]
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, work))
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def check(num_rows: int, context: int) -> None:
    """In float32 without kernels and in bfloat16, with the same rows cached."""
    config = _shape(2)
    exact_cache = _cache(config, num_rows * (context + BLOCK_SIZE), "float32")
    _fill(exact_cache)
    exact_cache.data.copy_(exact_cache.data.bfloat16())
    cache = _cache(config, num_rows * (context + BLOCK_SIZE))
    cache.data.copy_(exact_cache.data)
    expected = Step(_small(is_exact=True), exact_cache, num_rows, context).plainly()
    step = Step(_small(), cache, num_rows, context)
    found, num_changed = [], 0
    for overlaps in _ways(num_rows):
        graph = step.graph(overlaps=overlaps)
        step.logits.fill_(float("nan"))
        graph.replay()
        found.append(step.logits.clone())
        for _ in range(50):
            graph.replay()
            num_changed += not torch.equal(step.logits, found[-1])
    is_same = all(torch.equal(logits, found[0]) for logits in found)
    print(
        f"{num_rows} rows: error {relative_error(found[0], expected):.4f}; {num_changed} replays differ;"
        f" {'the same bits' if is_same else 'OTHER BITS'} without overlap",
        flush=True,
    )


def time_step(model: CausalLM, cache: KvCache, num_rows: int, context: int) -> None:
    step = Step(model, cache, num_rows, context)
    times = graph_times([step.graph(overlaps=overlaps) for overlaps in _ways(num_rows)])
    apart = f", {times[1]:.0f} without overlap" if len(times) > 1 else ""
    print(f"{num_rows} rows of {context}: {times[0]:.0f} us{apart}", flush=True)


def profile(model: CausalLM, cache: KvCache, context: int) -> None:
    """By kernel, microseconds; those that overlap count twice."""
    graph = Step(model, cache, 1, context).graph(overlaps=True)
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
    print(f"by kernel, 1 row of {context}: {total:.0f} us; launches a step x us = us a step")
    for row in rows:
        each, count = row.self_device_time_total / row.count, row.count / num_steps
        print(f"  {row.key[:56]:56} {count:5.0f} x {each:6.2f} = {count * each:6.0f}")


def attempt(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - one part that fails must not cost the others
        print(f"{type(error).__name__}: {str(error)[-300:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 2))
    parser.add_argument("--limit", type=int, default=300, help="seconds after which it gives up")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.limit, exit=True)
    print(torch.cuda.get_device_name(), torch.__version__)
    attempt(lambda: compile_all(args.processes))
    for num_rows in ROWS:
        attempt(lambda n=num_rows: check(n, args.context))
    _small.cache_clear()
    torch.cuda.empty_cache()
    config = _shape(args.layers)
    model = _model(config)
    cache = _cache(config, max(ROWS) * (args.context + BLOCK_SIZE))
    _fill(cache)
    for num_rows in ROWS:
        attempt(lambda n=num_rows: time_step(model, cache, n, args.context))
    attempt(lambda: profile(model, cache, args.context))


if __name__ == "__main__":
    main()
