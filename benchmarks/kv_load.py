"""Load a cached prefix, compute it, or both at once: time to the first token by tier and prefix length.

    python -m benchmarks.kv_load [--prompt-lens 512 1024 2048] [--source-mb-per-s 5 20] [--quick]

One engine thread, one request at a time, random prompts on small576. Each prompt is
computed; then its blocks are evicted from the device and it is asked again, with everything loaded, and as
the engine's planner has it ("both"). Tiers: host memory; disk, its files dropped from the page cache before
each load; and a source of a fixed speed, which is what a peer behind such a network is.

The goal: "both" takes at most 1.05 times what the better one of the other two takes. A row is measured in
pairs, one after the other on the same prompt, in turns which comes first, until the 99 % interval of the
median ratio is on one side of 1.05 or the row's share of the time is up. TMPDIR should be on a real disk.
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
from benchmarks.median_interval import Interval, median_interval
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

COLUMNS = (
    "from",
    "prompt",
    "compute ms",
    "load ms",
    "both ms",
    "loaded of both",
    "plan",
    "pairs",
    "both / better",
    "99 % from",
    "to",
    "goal",
)
MODES = ("compute", "load", "both")
GOAL = 1.05  # times the better one of compute and load that both may take
PAIRS_OF_A_PROMPT = 4  # from own tiers, which are quick
MAX_PROMPTS = 200
BLOCK_SIZE = 16
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
    parser.add_argument("--total-s", type=float, default=480.0, help="for all rows (default %(default)s)")
    parser.add_argument("--source-mb-per-s", type=float, nargs="+", default=[5.0, 20.0])
    parser.add_argument("--quick", action="store_true", help="a few pairs a row, no result file")
    args = parser.parse_args()
    ends_at = perf_counter() + (20.0 if args.quick else args.total_s)
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
                    num_left = len(choices) * len(args.prompt_lens) - len(rows)
                    left_s = ends_at - perf_counter()
                    # Most rows need less than their share, so one that needs more may have twice that.
                    rows.append(measure(bench, tier, prompt_len, min(left_s, 2 * left_s / num_left)))
                    print("\n".join(table(COLUMNS, rows)[-1:]), flush=True)
    print(*(counts := summary(rows)), sep="\n")
    if args.quick:
        return
    plots = [plot(tier, [row for row in rows if row["from"] == tier]) for tier in choices]
    notes = [
        "small576 (4 layers, latent of 576), float32, one request at a time; times are medians",
        "loaded of both: share of the prefix that the source brought in mode both; plan: what the planner "
        "made of every prompt of the row: where it is load, both and load are the same and differ by noise",
        "both / better: median over pairs of both and the better of compute and load, and its 99 % interval",
        *counts,
    ]
    print(write_result("kv-load", "Load, compute, or both", COLUMNS, rows, notes, plots))


@contextmanager
def running(
    checkpoint: Path, longest: int, tiers: dict[str, Any], bytes_per_s: float | None
) -> Iterator[Bench]:
    # In bfloat16 a token may differ where two are nearly equally likely: other chunks round otherwise.
    config = EngineConfig(model_dir=checkpoint, num_blocks=longest // 16 + 8, dtype="float32", **tiers)
    bench = Bench(build_engine(config), tiers.get("disk_kv_dir"), bytes_per_s)
    bench.thread.start()
    try:
        bench.ask(next(iter(_prompts(1, 512, seed=1))))  # cold buffers
        yield bench
    finally:
        bench.thread.stop()


class Row:
    """Measures one tier and prompt length, a prompt at a time."""

    def __init__(self, bench: Bench, prompt_len: int) -> None:
        self._bench = bench
        self._num_prefix_blocks = (prompt_len - 1) // BLOCK_SIZE
        self._num_pairs = 1 if bench.bytes_per_s else PAIRS_OF_A_PROMPT
        self._is_both_first = False
        self.seconds: dict[str, list[float]] = {mode: [] for mode in MODES}  # of pair i at i
        self.shares: list[float] = []

    @property
    def better(self) -> str:
        return min(("compute", "load"), key=lambda mode: median(self.seconds[mode]))

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.seconds["both"], self.seconds[self.better], strict=True)
        return [both_s / better_s for both_s, better_s in pairs]

    @property
    def plan(self) -> str:
        if set(self.shares) == {1.0}:
            return "load"
        return "compute" if set(self.shares) == {0.0} else "both"

    def add(self, prompt_ids: list[int]) -> None:
        bench = self._bench
        bench.use("compute")
        bench.evict_device()
        compute_s, computed = bench.ask(prompt_ids)
        blocks = bench.contents(prompt_ids) if bench.bytes_per_s else []
        for _ in range(self._num_pairs):
            self.seconds["compute"].append(compute_s)
            for mode in ("both", "load") if self._is_both_first else ("load", "both"):
                self._ask_again(mode, prompt_ids, blocks, computed)
            self._is_both_first = not self._is_both_first

    def _ask_again(
        self, mode: str, prompt_ids: list[int], blocks: list[memoryview], computed: SequenceOutput
    ) -> None:
        bench = self._bench
        bench.use(mode)
        bench.evict_device()
        source = None
        if bench.bytes_per_s is not None:
            source = ThrottledSource(blocks, bench.engine.kv_cache, bench.bytes_per_s)
        elapsed_s, output = bench.ask(prompt_ids, source)
        if source is not None:
            source.join()
        assert output.token_ids == computed.token_ids, "a load changed a token"
        share = (output.num_loaded_tokens + output.num_fetched_tokens) / BLOCK_SIZE / self._num_prefix_blocks
        assert mode == "both" or share == 1.0
        self.seconds[mode].append(elapsed_s)
        if mode == "both":
            self.shares.append(share)


def measure(bench: Bench, tier: str, prompt_len: int, row_s: float) -> dict[str, Any]:
    Row(bench, prompt_len).add(next(iter(_prompts(1, prompt_len, seed=prompt_len + 1))))  # sizes met first
    row = Row(bench, prompt_len)
    ends_at = perf_counter() + row_s
    for prompt_ids in _prompts(MAX_PROMPTS, prompt_len, seed=prompt_len):
        row.add(prompt_ids)
        interval = median_interval(row.ratios)
        if perf_counter() > ends_at or (interval is not None and interval.excludes(GOAL)):
            break
    medians = {mode: median(values) for mode, values in row.seconds.items()}
    return {
        "from": tier,
        "prompt": prompt_len,
        **{f"{mode} ms": medians[mode] * 1000 for mode in MODES},
        "loaded of both": median(row.shares),
        "plan": row.plan,
        "pairs": len(row.ratios),
        "both / better": median(row.ratios),
        "99 % from": interval and interval.low,
        "to": interval and interval.high,
        "goal": judge(interval),
        "samples": row.seconds,
    }


def judge(interval: Interval | None) -> str:
    if interval is None or not interval.excludes(GOAL):
        return "open"
    return "met" if interval.high <= GOAL else "NOT met"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    verdicts = [row["goal"] for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("met", "NOT met", "open"))
    return [f"both at most {GOAL:g} times the better of compute and load, {len(rows)} rows: {counts}"]


def plot(tier: str, rows: list[dict[str, Any]]) -> Path:
    lines = {mode: [(row["prompt"], row[f"{mode} ms"]) for row in rows] for mode in MODES}
    path = result_path(f"kv-load-{tier.replace(' ', '').replace('/', '-').lower()}", ".png")
    labels = ("prompt tokens", "ms to the first token")
    return plot_lines(path, f"Prefix from {tier}", lines, labels, log_y=True)


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
