"""`baton bench`"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from pathlib import Path

import orjson

from baton.bench.load import Target, closed_loop, open_loop, served_model
from baton.bench.measurement import RequestMeasurement, Summary, summarize
from baton.bench.report import render
from baton.bench.workload import Workload, poisson_arrivals
from baton.errors import CommandError
from baton.http_client import HttpStatusError, NoAnswer

_CONCURRENCY = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server (default %(default)s)")
    parser.add_argument("--model", help="default: the first one that the server lists")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=int, help=f"closed loop: streams at once (default {_CONCURRENCY})"
    )
    load.add_argument("--rate", type=float, help="open loop: requests a second, Poisson arrivals")
    parser.add_argument("--num-requests", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default %(default)s)")
    parser.add_argument(
        "--shared-prefix-len", type=int, default=0, help="leading tokens common to all prompts"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4_000, help="random ids below it (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default %(default)s)")
    parser.add_argument("--slo-ttft-ms", type=float, help="limit for goodput")
    parser.add_argument("--slo-tpot-ms", type=float, help="limit for goodput")
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, help="for one request (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results there")


def run(args: argparse.Namespace) -> int:
    if args.concurrency is None:
        args.concurrency = _CONCURRENCY
    if args.concurrency < 1:
        raise CommandError(f"--concurrency {args.concurrency}: must be at least 1")
    try:
        summary = asyncio.run(_bench(args))
    except (HttpStatusError, NoAnswer) as error:
        raise CommandError(f"baton bench: {error}", exit_code=1) from error
    except ValueError as error:
        raise CommandError(f"baton bench: {error}") from error
    print(render(_title(args), summary))
    if args.json:
        _write_json(args, summary)
    return 1 if summary.num_failed else 0


async def _bench(args: argparse.Namespace) -> Summary:
    workload = Workload(
        num_requests=args.num_requests,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        shared_prefix_len=args.shared_prefix_len,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    model = args.model or await served_model(args.url)
    target = Target(url=args.url, model=model, output_len=args.output_len, timeout_s=args.timeout_s)
    progress = _Progress(args.num_requests)
    if args.rate is None:
        measurements = await closed_loop(target, workload.prompts(), args.concurrency, progress.count)
    else:
        arrivals_s = poisson_arrivals(args.num_requests, args.rate, args.seed)
        measurements = await open_loop(target, workload.prompts(), arrivals_s, progress.count)
    progress.clear()
    return summarize(measurements, args.slo_ttft_ms, args.slo_tpot_ms)


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


def _title(args: argparse.Namespace) -> str:
    load = f"{args.concurrency} streams" if args.rate is None else f"{args.rate:g} requests/s (Poisson)"
    return f"{args.url}: {load}, {args.prompt_len} tokens in, {args.output_len} out"


def _write_json(args: argparse.Namespace, summary: Summary) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    document = {"settings": settings, "summary": dataclasses.asdict(summary)}
    try:
        args.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise CommandError(f"--json {args.json}: {error.strerror}") from error
