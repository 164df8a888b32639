"""Load a cached prefix, compute it, or both at once: time to the first token by tier and prefix length.

    python -m benchmarks.kv_load [--prompt-lens 512 1024 2048] [--repeats 5] [--source-mb-per-s 5 20]

One engine thread, one request at a time, random prompts on small576. Each prompt is
computed; then its blocks are evicted from the device and it is asked again, with everything loaded, and as
the engine's planner has it ("both"). Tiers: host memory; disk, its files dropped from the page cache before
each load; and a source of a fixed speed, which is what a peer behind such a network is.
Loads from own tiers are quick, so there
each prompt is loaded several times in either way, in turns. `worst` is the time of "both" over the better one
of the other two. TMPDIR should be on a real disk.
"""

from __future__ import annotations

import argparse
import os
import queue
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from baton.bench.workload import Workload
from benchmarks.cpu_throughput import make_checkpoint
from benchmarks.handoff import lengthen_context
from benchmarks.plots import plot_lines
from benchmarks.results_file import result_path, table, write_result
from benchmarks.throttled_source import ThrottledSource
from engine.build import build_engine
from engine.engine import Engine
from engine.engine_config import EngineConfig
from engine.engine_thread import EngineThread
from engine.kv_load import KvSource
from engine.load_planner import LoadPlanner
from engine.outputs import SequenceOutput, StepOutput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

COLUMNS = ("from", "prompt", "compute ms", "load ms", "both ms", "loaded of both", "worst")
MODES = ("compute", "load", "both")
LOADS_OF_A_PROMPT = 4  # in each of two ways
TIMEOUT_S = 120.0


class OneWayPlanner(LoadPlanner):
    """Everything is loaded, or nothing is."""

    def __init__(self, block_size: int, *, loads: bool) -> None:
        super().__init__(block_size)
        self._loads = loads

    def choose(self, sources: Iterable[KvSource], first_block: int, end_block: int) -> KvSource | None:
        return max(sources, key=lambda source: source.num_blocks) if self._loads else None

    def num_compute_blocks(self, num_open: int, remaining_s: float) -> int:
        return 0


@dataclass
class Bench:
    engine: Engine
    disk_dir: Path | None
    bytes_per_s: float | None = None  # of a source; None: the engine's own tiers
    num_asked: int = 0
    outputs: queue.Queue[SequenceOutput | BaseException] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.engine, self._on_step, self.outputs.put)
        block_size = self.engine.kv_layout.block_size
        self._planners: dict[str, LoadPlanner] = {
            "compute": OneWayPlanner(block_size, loads=False),
            "load": OneWayPlanner(block_size, loads=True),
            "both": self.engine._scheduler.loads.planner,
        }

    def _on_step(self, step: StepOutput) -> None:
        for output in step.outputs:
            self.outputs.put(output)

    def use(self, mode: str) -> None:
        """Every planner learns from every step, so that "both" knows how fast compute is."""
        loads = self.engine._scheduler.loads
        if loads.planner is not self._planners[mode]:
            self._planners[mode].__dict__.update(
                {k: v for k, v in loads.planner.__dict__.items() if k in ("_seconds", "_num_tokens")}
            )
            loads.planner = self._planners[mode]

    def ask(self, prompt_ids: list[int], source: KvSource | None = None) -> tuple[float, SequenceOutput]:
        """Seconds to the first token."""
        self.num_asked += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        seq = Sequence(self.num_asked, prompt_ids, sampling, kv_source=source)
        began = perf_counter()
        self.thread.call(lambda engine: engine.add(seq))
        output = self.outputs.get(timeout=TIMEOUT_S)
        if isinstance(output, BaseException):
            raise output
        return perf_counter() - began, output

    def evict_device(self) -> None:
        """When all that was to be saved is saved."""
        while not self.thread.call(lambda engine: engine._tiers.is_idle).result():
            pass

        def evict(engine: Engine) -> None:
            pool = engine._pool
            pool.release(pool.allocate(pool.num_available))

        self.thread.call(evict).result()
        if self.disk_dir is not None:
            for path in self.disk_dir.glob("*.kv"):
                _drop_from_page_cache(path)

    def contents(self, prompt_ids: list[int]) -> list[memoryview]:
        def read(engine: Engine) -> list[memoryview]:
            cache = engine.kv_cache
            block_ids = engine._pool.lookup(engine.hash_chain.hashes(prompt_ids))
            return [cache.read_blocks(0, cache.layout.num_layers, [block_id]) for block_id in block_ids]

        return self.thread.call(read).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--source-mb-per-s", type=float, nargs="+", default=[5.0, 20.0])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint = directory / "small576"
        make_checkpoint(checkpoint)
        lengthen_context(checkpoint)
        choices = {
            "host": {"host_kv_bytes": 1 << 30},
            "disk": {"disk_kv_dir": directory / "kv", "disk_kv_bytes": 4 << 30},
            **{f"{speed:g} MB/s": {} for speed in args.source_mb_per_s},
        }
        for tier, tiers in choices.items():
            bytes_per_s = None if tiers else float(tier.split()[0]) * 1e6
            with running(checkpoint, max(args.prompt_lens), tiers, bytes_per_s) as bench:
                for prompt_len in args.prompt_lens:
                    rows.append(measure(bench, tier, prompt_len, args.repeats))
                    print("\n".join(table(COLUMNS, rows)[-1:]), flush=True)
    plots = [plot(tier, [row for row in rows if row["from"] == tier]) for tier in choices]
    notes = [
        f"small576 (4 layers, latent of 576), one request at a time, medians of {args.repeats}",
        "`loaded of both`: share of the prefix that the source brought in mode both",
        "`worst`: both / the better of compute and load",
    ]
    print(write_result("kv-load", "Load, compute, or both", COLUMNS, rows, notes, plots))


@contextmanager
def running(
    checkpoint: Path, longest: int, tiers: dict[str, Any], bytes_per_s: float | None
) -> Iterator[Bench]:
    config = EngineConfig(model_dir=checkpoint, num_blocks=longest // 16 + 8, **tiers)
    bench = Bench(build_engine(config), tiers.get("disk_kv_dir"), bytes_per_s)
    bench.thread.start()
    try:
        bench.ask(next(iter(_prompts(1, 512, seed=1))))  # cold buffers
        yield bench
    finally:
        bench.thread.stop()


def measure(bench: Bench, tier: str, prompt_len: int, num_repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    shares = []
    for prompt_ids in _prompts(num_repeats, prompt_len, seed=prompt_len):
        bench.use("compute")
        bench.evict_device()
        elapsed_s, first = bench.ask(prompt_ids)
        seconds["compute"].append(elapsed_s)
        blocks = bench.contents(prompt_ids) if bench.bytes_per_s else []
        for mode in turns(1 if bench.bytes_per_s else LOADS_OF_A_PROMPT):
            bench.use(mode)
            bench.evict_device()
            source = None
            if bench.bytes_per_s is not None:
                source = ThrottledSource(blocks, bench.engine.kv_cache, bench.bytes_per_s)
            elapsed_s, output = bench.ask(prompt_ids, source)
            if source is not None:
                source.join()
            assert output.token_ids == first.token_ids, "a load changed a token"
            seconds[mode].append(elapsed_s)
            num_loaded = output.num_loaded_tokens + output.num_fetched_tokens
            assert num_loaded or mode == "both"
            if mode == "both":
                shares.append(num_loaded / ((prompt_len - 1) // 16 * 16))
    medians = {mode: median(values) for mode, values in seconds.items()}
    return {
        "from": tier,
        "prompt": prompt_len,
        **{f"{mode} ms": medians[mode] * 1000 for mode in MODES},
        "loaded of both": median(shares),
        "worst": medians["both"] / min(medians["compute"], medians["load"]),
        "samples": seconds,
    }


def turns(num_each: int) -> Iterator[str]:
    for i in range(num_each):
        yield from ("load", "both") if i % 2 == 0 else ("both", "load")


def plot(tier: str, rows: list[dict[str, Any]]) -> Path:
    lines = {mode: [(row["prompt"], row[f"{mode} ms"]) for row in rows] for mode in MODES}
    path = result_path(f"kv-load-{tier.replace(' ', '').replace('/', '-').lower()}", ".png")
    return plot_lines(path, f"Prefix from {tier}", lines, ("prompt tokens", "ms to the first token"))


def _prompts(num_prompts: int, prompt_len: int, seed: int) -> Iterator[list[int]]:
    workload = Workload(num_requests=num_prompts, prompt_len=prompt_len, output_len=1, seed=seed)
    yield from (list(prompt_ids) for prompt_ids in workload.prompts())


def _drop_from_page_cache(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


if __name__ == "__main__":
    main()
