"""`baton bench`"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from pathlib import Path

import orjson

from baton.bench import dataset
from baton.bench.load import Target, closed_sessions, open_sessions, served_model
from baton.bench.measurement import RequestMeasurement, Summary, by_class, summarize
from baton.bench.report import ROWS_LEGEND, render, render_rows
from baton.bench.workload import Session
from baton.errors import CommandError
from baton.http_client import HttpStatusError, NoAnswer, Server
from baton.settings import load_command_settings
from servicekit.descriptors import reserve_descriptors
from servicekit.garbage import exempt_from_garbage_search

_CONCURRENCY = 8
_SEEDS_APART = 10_007  # between the rates of a sweep: none finds the prompts of another in a cache


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One rate, or one closed loop."""

    load: str
    rate_per_s: float | None
    summary: Summary
    classes: dict[str, Summary]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server (default %(default)s)")
    parser.add_argument("--model", help="default: the first one that the server lists")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=int, help=f"closed loop: streams at once (default {_CONCURRENCY})"
    )
    load.add_argument(
        "--rate",
        type=float,
        nargs="+",
        help="open loop: requests a second, Poisson arrivals; several: one after another",
    )
    dataset.add_arguments(parser)
    parser.add_argument("--slo-ttft-ms", type=float, help="limit for goodput")
    parser.add_argument("--slo-tpot-ms", type=float, help="limit for goodput")
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, help="for one request (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results there")


def run(args: argparse.Namespace) -> int:
    if args.concurrency is not None and args.concurrency < 1:
        raise CommandError(f"--concurrency {args.concurrency}: must be at least 1")
    try:
        runs = asyncio.run(_bench(args))
        title = f"{args.url}: {dataset.describe(args)}"
    except (HttpStatusError, NoAnswer) as error:
        raise CommandError(f"baton bench: {error}", exit_code=1) from error
    except (ValueError, OSError) as error:
        raise CommandError(f"baton bench: {error}") from error
    _show(title, runs)
    if args.json:
        _write_json(args, runs)
    return 1 if any(r.summary.num_failed for r in runs) else 0


async def _bench(args: argparse.Namespace) -> list[Run]:
    rates: list[float | None] = args.rate or [None]
    plans = [_plan(args, rate, args.seed + _SEEDS_APART * index) for index, rate in enumerate(rates)]
    api_key = load_command_settings().api_key
    model = args.model or await served_model(Server(args.url, api_key))
    target = Target(url=args.url, model=model, timeout_s=args.timeout_s, api_key=api_key)
    # A pause here would look like one of the server.
    reserve_descriptors()
    exempt_from_garbage_search()
    return [await _one_run(args, target, plan) for plan in plans]


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    sessions: list[Session]
    rate_per_s: float | None
    arrivals_s: list[float] | None  # None: closed loop


def _plan(args: argparse.Namespace, rate_per_s: float | None, seed: int) -> _Plan:
    sessions, arrivals_s = dataset.build_sessions(args, seed)
    if rate_per_s is not None:
        arrivals_s = dataset.arrivals(sessions, rate_per_s, seed)
    elif args.concurrency is not None:
        arrivals_s = None
    return _Plan(sessions, rate_per_s, arrivals_s)


async def _one_run(args: argparse.Namespace, target: Target, plan: _Plan) -> Run:
    progress = _Progress(sum(session.num_requests for session in plan.sessions))
    if plan.arrivals_s is None:
        concurrency = args.concurrency or _CONCURRENCY
        load = f"{concurrency} streams"
        measurements = await closed_sessions(target, plan.sessions, concurrency, progress.count)
    else:
        load = (
            "times of the trace" if plan.rate_per_s is None else f"{plan.rate_per_s:g} requests/s (Poisson)"
        )
        measurements = await open_sessions(target, plan.sessions, plan.arrivals_s, progress.count)
    progress.clear()
    limits = (args.slo_ttft_ms, args.slo_tpot_ms)
    summary = summarize(measurements, *limits)
    classes = {
        name: summarize(own, *limits, duration_s=summary.duration_s)
        for name, own in by_class(measurements).items()
    }
    return Run(load, plan.rate_per_s, summary, classes)


class _Progress:
    """A counter on the terminal; silent when the output is a file."""

    def __init__(self, num_requests: int) -> None:
        self._num_requests = num_requests
        self._num_done = 0
        self._is_shown = sys.stderr.isatty()

    def count(self, _: RequestMeasurement) -> None:
        self._num_done += 1
        if self._is_shown:
            print(f"\r{self._num_done}/{self._num_requests} requests", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show(title: str, runs: list[Run]) -> None:
    """One run in full; several, and classes, as a table."""
    if len(runs) == 1:
        [only] = runs
        print(render(f"{title}; {only.load}", only.summary))
        if only.classes:
            print("\n" + render_rows("class", only.classes) + "\n" + ROWS_LEGEND)
        return
    print(title)
    print(render_rows("rate", {f"{r.rate_per_s:g}": r.summary for r in runs}))
    for name in runs[0].classes:
        rows = {f"{r.rate_per_s:g}": r.classes[name] for r in runs if name in r.classes}
        print(f"\n{name}\n" + render_rows("rate", rows))
    print("\n" + ROWS_LEGEND)


def _write_json(args: argparse.Namespace, runs: list[Run]) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    document: dict[str, object] = {"settings": settings, "runs": [dataclasses.asdict(r) for r in runs]}
    if len(runs) == 1:
        document["summary"] = dataclasses.asdict(runs[0].summary)
    try:
        args.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise CommandError(f"--json {args.json}: {error.strerror}") from error
