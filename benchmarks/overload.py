"""What overload does to goodput: open-loop arrivals at 0.5 to 10 times the capacity of a real stack.

    python -m benchmarks.overload [--factors 0.5 1 2 4 10] [--seconds 15] [--write]

The capacity is measured first, by a closed loop that keeps twice the batch busy. Then requests arrive at
random (Poisson), whether or not others have ended. Good is an answer that came whole with its first token
within the limit; refused is a 503; failed is anything else, and must not happen.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from baton.bench.load import Target, brings_token
from baton.bench.measurement import percentile
from baton.http_client import HttpClient, HttpStatusError, NoAnswer
from benchmarks.plots import plot_lines
from benchmarks.results_file import result_path, table, write_result
from benchmarks.serving import baton_up

MODEL = "tiny"
VOCABULARY = range(3, 4096)
RAMP_S = 4.0  # until the queue is as long as it gets; not counted
COLUMNS = (
    "x capacity",
    "offered/s",
    "good/s",
    "of peak",
    "late/s",
    "refused/s",
    "failed",
    "TTFT p50 ms",
    "TTFT p99 ms",
    "refusal p50 ms",
    "refusal p99 ms",
)


@dataclass(slots=True)
class Outcome:
    sent_at: float  # time.perf_counter(), as the others
    first_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0  # 200, 503, or 0 for no answer
    error: str = ""


class Client:
    """Sends requests over as many connections as are needed at once."""

    def __init__(self, target: Target, prompt_len: int) -> None:
        self._target = target
        self._prompt_len = prompt_len
        self._idle: list[HttpClient] = []
        self._random = random.Random(1)
        self.outcomes: list[Outcome] = []

    async def request(self) -> None:
        prompt = self._random.choices(VOCABULARY, k=self._prompt_len)
        outcome = Outcome(time.perf_counter())
        client = self._idle.pop() if self._idle else HttpClient(self._target.server)

        def on_event(data: bytes, read_at: float) -> None:
            event = orjson.loads(data)
            if event.get("error"):
                outcome.error = str(event["error"])
            elif not outcome.first_at and brings_token(event):
                outcome.first_at = read_at

        try:
            payload = self._target.payload(prompt)
            await client.post_stream("/v1/completions", payload, on_event, self._target.timeout_s)
            outcome.status = 0 if outcome.error else 200
        except HttpStatusError as error:
            outcome.status, outcome.error = error.status, str(error)
        except NoAnswer as error:
            outcome.error = str(error)
        outcome.ended_at = time.perf_counter()
        self.outcomes.append(outcome)
        self._idle.append(client)

    def close(self) -> None:
        for client in self._idle:
            client.close()


async def measure_capacity(client: Client, concurrency: int, seconds: float) -> float:
    """Requests a second that end while `concurrency` are always open."""
    end_at = time.perf_counter() + RAMP_S + seconds

    async def visit() -> None:
        while time.perf_counter() < end_at:
            await client.request()

    await asyncio.gather(*(visit() for _ in range(concurrency)))
    ended = [o for o in client.outcomes if o.status == 200 and end_at - seconds <= o.ended_at < end_at]
    return len(ended) / seconds


async def offer(client: Client, rate_per_s: float, seconds: float, seed: int) -> float:
    """Poisson arrivals; returns the start, when all have ended."""
    rng = random.Random(seed)
    start = time.perf_counter()
    next_at = start
    async with asyncio.TaskGroup() as requests:
        while (next_at := next_at + rng.expovariate(rate_per_s)) < start + RAMP_S + seconds:
            await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
            requests.create_task(client.request())
    return start


def row_of(outcomes: Sequence[Outcome], start: float, options: argparse.Namespace) -> dict[str, float]:
    """Counts what ended between ramp and end; latencies of what was sent then."""
    begin, end = start + RAMP_S, start + RAMP_S + options.seconds
    ended = [o for o in outcomes if begin <= o.ended_at < end]
    served = [o for o in ended if o.status == 200]
    good = [o for o in served if o.first_at - o.sent_at <= options.ttft_s]
    refused = [o for o in ended if o.status == 503]
    failed = [o for o in outcomes if o.status not in (200, 503)]
    for outcome in failed[:3]:
        print("failed:", outcome.status, outcome.error, file=sys.stderr)
    ttft = sorted((o.first_at - o.sent_at) * 1000 for o in served)
    refusal = sorted((o.ended_at - o.sent_at) * 1000 for o in refused)
    seconds = options.seconds
    return {
        "offered/s": sum(begin <= o.sent_at < end for o in outcomes) / seconds,
        "good/s": len(good) / seconds,
        "late/s": (len(served) - len(good)) / seconds,
        "refused/s": len(refused) / seconds,
        "failed": len(failed),
        **_percentiles("TTFT", ttft),
        **_percentiles("refusal", refusal),
    }


def _percentiles(name: str, ordered: Sequence[float]) -> dict[str, float]:
    return {f"{name} p{p} ms": percentile(ordered, p) for p in (50, 99) if ordered}


async def bench(url: str, options: argparse.Namespace) -> tuple[float, list[dict[str, float]]]:
    target = Target(url=url, model=MODEL, output_len=options.output_len, timeout_s=60.0)
    warm = Client(target, options.prompt_len)
    capacity = await measure_capacity(warm, 2 * options.max_running, options.seconds)
    warm.close()
    rows = []
    for seed, factor in enumerate(options.factors):
        client = Client(target, options.prompt_len)
        start = await offer(client, factor * capacity, options.seconds, seed)
        client.close()
        rows.append({"x capacity": factor, **row_of(client.outcomes, start, options)})
    peak = max(row["good/s"] for row in rows)
    for row in rows:
        row["of peak"] = row["good/s"] / peak
    return capacity, rows


def run(options: argparse.Namespace, directory: Path) -> tuple[float, list[dict[str, float]]]:
    model_dir = directory / MODEL
    make = [sys.executable, "-m", "baton", "make-checkpoint", str(model_dir), "--arch", "deepseek_v3"]
    subprocess.run(make, check=True, capture_output=True)
    flags = ["--model", str(model_dir), "--served-model-name", MODEL, "--dtype", "float32", "--threads", "1"]
    flags += ["--num-blocks", "2000", "--max-running", str(options.max_running)]
    environment = {
        "BATON_ROUTER_MAX_QUEUE_WAIT_S": str(options.max_queue_wait_s),
        "BATON_ROUTER_REQUEST_TIMEOUT_S": str(options.request_timeout_s),
        "BATON_ROUTER_LOG_LEVEL": "WARNING",
    }
    with baton_up(*flags, environment=environment) as server:
        return asyncio.run(bench(server.url, options))


def write(options: argparse.Namespace, capacity: float, rows: Sequence[dict[str, float]]) -> None:
    notes = [
        f"capacity {capacity:.2f} requests/s, measured with {2 * options.max_running} always open",
        f"one prefill and one decode worker, batch of {options.max_running}; prompts of {options.prompt_len} "
        f"tokens, {options.output_len} out",
        f"max_queue_wait_s {options.max_queue_wait_s:g}, request_timeout_s {options.request_timeout_s:g}",
        f"good: whole, first token within {options.ttft_s:g} s",
        f"{options.seconds:g} s each after {RAMP_S:g} s of ramp; client, router, workers share the machine",
    ]
    plot = plot_lines(
        result_path("overload", ".png"),
        "Goodput under overload",
        {
            name: [(row["x capacity"], row[name]) for row in rows]
            for name in ("good/s", "refused/s", "late/s")
        },
        ("offered load / capacity", "requests/s"),
    )
    print(write_result("overload", "Goodput under overload", COLUMNS, rows, notes, [plot]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 10.0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--max-queue-wait-s", type=float, default=2.0)
    parser.add_argument("--request-timeout-s", type=float, default=20.0)
    parser.add_argument("--ttft-s", type=float, default=3.0, help="latest first token of a good answer")
    parser.add_argument(
        "--write", action="store_true", help="JSON, Markdown and plot into benchmarks/results"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        capacity, rows = run(options, Path(directory))
    print(f"capacity: {capacity:.2f} requests/s")
    print(*table(COLUMNS, rows), sep="\n")
    if options.write:
        write(options, capacity, rows)


if __name__ == "__main__":
    main()
