"""Does routing by cache pay? The policies beside each other, on loads with and without shared prefixes.

    python -m benchmarks.prefix_routing [--quick] [--loads "shared prefix" "no sharing" chat trace]

Two prefill and two decode workers (or, with --aggregated, four that do both) on small576, started once for
each policy and repeat; the policies take turns, and all of them get the same prompts at the same moments.
How fast requests come follows from what the machine can do, which is measured first.
Clients and servers share the machine, so the workers share its cores too: what a policy saves in compute
shortens everybody's queue.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baton.bench.load import Target, closed_loop, open_sessions, served_model
from benchmarks.cpu_throughput import make_checkpoint
from benchmarks.metrics_page import read_counters
from benchmarks.plots import plot_distributions
from benchmarks.results_file import result_path, table, write_result
from benchmarks.routing_analysis import COLUMNS, GOAL_LOADS, LOCAL, Run, result_rows, ttft_ms, verdicts
from benchmarks.routing_loads import LOAD_NAMES, OUTPUT_LEN, Load, Sizes, build_loads, capacity_probes
from benchmarks.serving import Server, baton_up

POLICIES = ("prefix", "round_robin", "least_loaded")
ROUTER_COUNTERS = ("baton_router_hit_tokens_total", "baton_router_predicted_hit_tokens_total")
DECISIONS, LOCALLY = "baton_router_decisions_total", 'prefill_reason="local"'


def main() -> None:
    args = parse_arguments()
    sizes = Sizes().quick() if args.quick else Sizes()
    began = time.monotonic()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or Path(directory) / "small576"
        if not checkpoint.exists():
            make_checkpoint(checkpoint)
        with baton_up(*up_options(args, sizes, checkpoint, "least_loaded")) as server:
            sizes = replace(sizes, capacity_per_s=asyncio.run(capacity_per_s(server, sizes)))
        print(f"capacity: {sizes.capacity_per_s:.2f} prompts/s", flush=True)
        for repeat in range(1 if args.quick else args.repeats):
            loads = build_loads(args.loads, sizes, repeat)
            for policy in in_turn(args.policies, repeat):
                with baton_up(*up_options(args, sizes, checkpoint, policy)) as server:
                    runs += asyncio.run(run_loads(server, policy, repeat, loads))
                print("\n".join(table(COLUMNS, result_rows(runs[-len(loads) :]))[2:]), flush=True)
    rows = sorted(result_rows(runs), key=lambda row: args.loads.index(row["load"]))
    print("\n".join([*table(COLUMNS, rows), *verdicts(rows)]))
    print(f"took {time.monotonic() - began:.0f} s")
    if not args.quick:
        print(write(args, sizes, runs, rows))
    sys.exit(1 if any(row["failed"] for row in rows) else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_routing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, help="default: small576, made for this run")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--loads", nargs="+", default=list(LOAD_NAMES[:3]), choices=LOAD_NAMES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--aggregated", action="store_true", help="four workers that prefill and decode")
    parser.add_argument("--up-options", default="", help="more options of `baton up`, as one string")
    parser.add_argument("--quick", action="store_true", help="few requests, once, no result file")
    return parser.parse_args()


def in_turn(policies: Sequence[str], repeat: int) -> list[str]:
    """Another one begins each repeat."""
    first = repeat % len(policies)
    return [*policies[first:], *policies[:first]]


def up_options(args: argparse.Namespace, sizes: Sizes, checkpoint: Path, policy: str) -> list[str]:
    workers = ["--aggregated", "--decode", "4"] if args.aggregated else ["--prefill", "2", "--decode", "2"]
    blocks = ["--num-blocks", str(sizes.worker_blocks), "--block-size", str(sizes.block_size)]
    limits = ["--max-model-len", "2048", "--threads", "1", "--dtype", "float32"]
    more = shlex.split(args.up_options)
    return ["--model", str(checkpoint), "--policy", policy, *workers, *blocks, *limits, *more]


async def capacity_per_s(server: Server, sizes: Sizes) -> float:
    """Prompts a second with four at a time, nothing cached; the best of a few rounds, since whatever else the
    machine does makes it look slower and the loads too easy."""
    target = Target(
        url=server.url, model=await served_model(server.url), output_len=OUTPUT_LEN, timeout_s=120.0
    )
    rates = []
    for prompts in capacity_probes(sizes):
        began = time.monotonic()
        await closed_loop(target, prompts, concurrency=4)
        rates.append(len(prompts) / (time.monotonic() - began))
    return max(rates)


async def run_loads(server: Server, policy: str, repeat: int, loads: Sequence[Load]) -> list[Run]:
    target = Target(url=server.url, model=await served_model(server.url), timeout_s=120.0)
    runs = []
    for load in loads:
        warm_up = await closed_loop(target, load.warm_up, concurrency=2)
        if failures := [m.error for m in warm_up if not m.is_ok]:
            raise RuntimeError(f"{policy}, warm-up of {load.name}: {failures[0]}")
        before = router_counters(server)
        measurements = await open_sessions(target, load.sessions, load.arrivals_s)
        after = router_counters(server)
        grown = {name: value - before[name] for name, value in after.items()}
        runs.append(
            Run(load=load.name, policy=policy, repeat=repeat, measurements=measurements, counters=grown)
        )
    return runs


def router_counters(server: Server) -> dict[str, float]:
    counters = read_counters(f"{server.url}/metrics")
    found = {name: counters.get(name, 0.0) for name in ROUTER_COUNTERS}
    return found | {LOCAL: read_counters(f"{server.url}/metrics", LOCALLY).get(DECISIONS, 0.0)}


def write(args: argparse.Namespace, sizes: Sizes, runs: Sequence[Run], rows: Sequence[dict]) -> Path:
    name = "prefix-routing-aggregated" if args.aggregated else "prefix-routing"
    if not set(args.loads) & set(GOAL_LOADS):
        name = "-".join([name, *args.loads])
    plots = [
        plot_distributions(
            result_path(f"{name}-{load.replace(' ', '-')}", ".png"),
            f"TTFT, {load}",
            ttft_ms(runs, load),
            "ms",
        )
        for load in args.loads
    ]
    workers = "4 workers of both roles" if args.aggregated else "2 prefill and 2 decode workers"
    notes = [
        f"small576 (64.6 M parameters, random), float32; {workers}, one thread each, {args.repeats} repeats",
        *sizes.describe(),
        "TTFT and TPOT over the requests of all repeats; hit rate: hit tokens / prompt tokens",
        *verdicts(rows),
    ]
    return write_result(name, "Routing by cache", COLUMNS, rows, notes, plots)


if __name__ == "__main__":
    main()
