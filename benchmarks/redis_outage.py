"""Redis is killed and started again, empty, while requests run: does anybody notice?

    python -m benchmarks.redis_outage [--quick]

Two prefill and two decode workers on small576, requests with shared prefixes in an open loop. A request
fails when it ends with an error; the hit rate is hit tokens / prompt tokens of the requests sent in a time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.bench.load import Target, closed_loop, open_sessions, served_model
from baton.bench.measurement import RequestMeasurement, summarize
from baton.bench.workload import Workload, poisson_arrivals
from benchmarks.cpu_throughput import make_checkpoint
from benchmarks.plots import plot_lines
from benchmarks.results_file import result_path, table, write_result
from benchmarks.serving import Server, baton_up
from kvstore.embedded import EmbeddedServer

COLUMNS = ("phase", "seconds", "requests", "failed", "hit rate", "TTFT p50 ms", "TTFT p99 ms")
RATE_PER_S = 1.25
BIN_S = 5.0
NUM_GROUPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds since the first request."""

    killed_s: float
    back_s: float
    end_s: float

    def phases(self) -> dict[str, tuple[float, float]]:
        return {
            "before": (0.0, self.killed_s),
            "Redis away": (self.killed_s, self.back_s),
            "Redis back": (self.back_s, self.end_s),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redis_outage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, help="default: small576, made for this run")
    parser.add_argument("--quick", action="store_true", help="a few seconds a phase, no result file")
    args = parser.parse_args()
    times = Times(killed_s=6, back_s=11, end_s=20) if args.quick else Times(killed_s=30, back_s=50, end_s=100)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or Path(directory) / "small576"
        if not checkpoint.exists():
            make_checkpoint(checkpoint)
        redis = EmbeddedServer()
        try:
            environment = {"REDIS_URL": redis.start()}
            with baton_up(*up_options(checkpoint), environment=environment) as server:
                measurements = asyncio.run(outage(server, redis, times))
        finally:
            redis.stop()
    rows = phase_rows(measurements, times)
    print("\n".join(table(COLUMNS, rows)))
    if not args.quick:
        print(write(rows, measurements, times))
    sys.exit(1 if any(row["failed"] for row in rows) else 0)


def up_options(checkpoint: Path) -> list[str]:
    workers = ["--prefill", "2", "--decode", "2", "--threads", "1", "--num-blocks", "300"]
    return ["--model", str(checkpoint), *workers, "--max-model-len", "2048", "--dtype", "float32"]


async def outage(server: Server, redis: EmbeddedServer, times: Times) -> list[RequestMeasurement]:
    """Prefixes are sent once before; then the load runs and Redis goes and comes."""
    workload = Workload(
        num_requests=round(times.end_s * RATE_PER_S),
        prompt_len=480,
        output_len=16,
        shared_prefix_len=384,
        num_groups=NUM_GROUPS,
        seed=3,
    )
    target = Target(url=server.url, model=await served_model(server.url), timeout_s=120.0)
    await closed_loop(target, workload.prefixes(), concurrency=2)
    arrivals_s = poisson_arrivals(workload.num_requests, RATE_PER_S, seed=3)
    stretch = times.end_s / arrivals_s[-1]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_kill_and_start(redis, times))
        load = tasks.create_task(
            open_sessions(target, workload.sessions(), [at_s * stretch for at_s in arrivals_s])
        )
    return load.result()


async def _kill_and_start(redis: EmbeddedServer, times: Times) -> None:
    await asyncio.sleep(times.killed_s)
    redis.kill()
    await asyncio.sleep(times.back_s - times.killed_s)
    redis.start()


def phase_rows(measurements: Sequence[RequestMeasurement], times: Times) -> list[dict[str, Any]]:
    start = min(m.sent_at for m in measurements)
    rows = []
    for name, (begin_s, end_s) in times.phases().items():
        is_last = end_s == times.end_s
        own = [
            m for m in measurements if begin_s <= m.sent_at - start and (is_last or m.sent_at - start < end_s)
        ]
        summary = summarize(own) if own else None
        rows.append(
            {
                "phase": name,
                "seconds": f"{begin_s:g} to {end_s:g}",
                "requests": len(own),
                "failed": summary.num_failed if summary else 0,
                "hit rate": hit_rate(own),
                "TTFT p50 ms": summary and summary.ttft_ms and summary.ttft_ms.p50,
                "TTFT p99 ms": summary and summary.ttft_ms and summary.ttft_ms.p99,
                "errors": summary.errors if summary else {},
            }
        )
    return rows


def hit_rate(measurements: Sequence[RequestMeasurement]) -> float | None:
    """Over tokens, of the requests that were served."""
    served = [m for m in measurements if m.is_ok]
    num_tokens = sum(m.num_prompt_tokens for m in served)
    return sum(m.num_hit_tokens for m in served) / num_tokens if num_tokens else None


def hit_rate_over_time(measurements: Sequence[RequestMeasurement], bin_s: float) -> list[tuple[float, float]]:
    """(middle of the bin in seconds since the first request, hit rate), bins without requests left out."""
    start = min(m.sent_at for m in measurements)
    bins: dict[int, list[RequestMeasurement]] = {}
    for m in measurements:
        bins.setdefault(int((m.sent_at - start) / bin_s), []).append(m)
    rates = [((index + 0.5) * bin_s, hit_rate(own)) for index, own in sorted(bins.items())]
    return [(at_s, rate) for at_s, rate in rates if rate is not None]


def write(rows: Sequence[dict[str, Any]], measurements: Sequence[RequestMeasurement], times: Times) -> Path:
    plot = plot_lines(
        result_path("redis-outage", ".png"),
        "Hit rate while Redis is away",
        {"hit tokens / prompt tokens": hit_rate_over_time(measurements, BIN_S)},
        ("s", "hit rate"),
        {"killed": times.killed_s, "back, empty": times.back_s},
    )
    notes = [
        "small576, float32; 2 prefill and 2 decode workers, one thread each; Redis is a server of its own",
        f"{RATE_PER_S:g} requests/s (Poisson), 480 tokens, 384 of them one of {NUM_GROUPS} prefixes, 16 out",
    ]
    return write_result("redis-outage", "Redis killed and started empty", COLUMNS, rows, notes, [plot])


if __name__ == "__main__":
    main()
