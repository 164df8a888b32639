"""The whole stack on one GPU or two: router, workers as processes, streaming clients on the same host.

    python -m benchmarks.gpu_serve run [--topologies both shared two] [--parts rows sweep isolation handoff]
                                       [--rows 0 4 7] [--rates 8 16 24] [--seconds 12] [--json FILE]
                                       [--carriers ipc pinned grpc] [--gaps]
    python -m benchmarks.gpu_serve publish FILE

DeepSeek-V2-Lite's shape with made-up weights. Parts:

rows       the table of closed loops, greedy, to the full length
sweep      Poisson arrivals, three quarters chat and one quarter long prompts, nothing shared. Good: TTFT of
           at most 1 s and TPOT of at most 15 ms; good/s counts requests by when they were sent
isolation  TPOT of chat streams, alone and beside a constant stream of long prompts
handoff    long prompts one at a time: TTFT, and the part of the hand-off that compute does not hide; with
           topology both the TTFT of the same prompts without a hand-off, on a GPU that nobody shares

With several carriers each topology with a hand-off is run once for each. A topology that fails is named, with
the ends of its logs, and the next one is tried.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.bench.load import Target
from baton.bench.measurement import RequestMeasurement
from benchmarks import gpu_table
from benchmarks.gap_causes import (
    CAUSE_COLUMNS,
    LONGEST_COLUMNS,
    PAUSE_COLUMNS,
    STEP_COLUMNS,
    cause_rows,
    logged_steps,
    longest_gaps,
    longest_rows,
    pause_rows,
    step_rows,
)
from benchmarks.gpu_loads import (
    ADDED_COLUMNS,
    HANDOFF_COLUMNS,
    ISOLATION_COLUMNS,
    SWEEP_COLUMNS,
    TINY_LOADS,
    Clients,
    Loads,
    added_rows,
)
from benchmarks.gpu_topologies import (
    CARRIERS,
    SERVED_NAME,
    TINY,
    TOPOLOGIES,
    Scale,
    Topology,
    topology,
    write_model,
)
from benchmarks.results_file import table, write_result
from benchmarks.serving import Server, baton_up
from engine.checkpoint.model_config import DUMMY_SPREADS
from kvstore.embedded import EmbeddedServer
from servicekit.descriptors import reserve_descriptors
from servicekit.logging import configure_logging
from servicekit.loop_watch import watched_loop

COLUMNS = {
    "rows": gpu_table.COLUMNS,
    "sweep": SWEEP_COLUMNS,
    "isolation": ISOLATION_COLUMNS,
    "handoff": HANDOFF_COLUMNS,
}
START_COLUMNS = ("process", "event", "seconds")
_START_TIMEOUT_S = 400.0
_TAIL_BYTES = 3000
_DEBUG_LOGS = {f"BATON_{process}_LOG_LEVEL": "DEBUG" for process in ("ROUTER", "PREFILL", "DECODE")}


def main(argv: list[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    if args.mode == "publish":
        publish(args.file)
        return 0
    document: dict[str, Any] = {"facts": _facts(args), "topologies": {}}
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        log_dir = args.log_dir or Path(name) / "logs"
        scale = _scale(args)
        model_dir = write_model(Path(name) / SERVED_NAME, scale)
        for title, topology_name, carrier in _runs(args):
            found: dict[str, Any] = {}
            document["topologies"][title] = found
            try:
                plan = topology(topology_name, model_dir, scale, args.policy, carrier)
                if args.gaps:
                    plan = replace(plan, environment={**plan.environment, **_DEBUG_LOGS})
                _run_topology(title, plan, args, log_dir / title, found)
            except Exception as error:  # noqa: BLE001 - device time is scarce: on to the next one
                failed += 1
                found["error"] = repr(error)
                print(f"{title} FAILED: {error}", *_tails(log_dir / title), sep="\n")
            if args.json:
                args.json.write_text(json.dumps(document, indent=1) + "\n")
    if rows := added_rows(document["topologies"]):
        _show("what a hand-off adds, beside the same prompts without one", ADDED_COLUMNS, rows)
    return 1 if failed else 0


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(title, topology, carrier)"""
    for name in args.topologies:
        if name == "both" or len(args.carriers) == 1:
            yield name, name, args.carriers[0]
        else:
            yield from ((f"{name}-{carrier}", name, carrier) for carrier in args.carriers)


def _run_topology(
    name: str, plan: Topology, args: argparse.Namespace, log_dir: Path, found: dict[str, Any]
) -> None:
    """Results so far are in `found` when it raises."""
    store = EmbeddedServer()
    try:
        environment = {**plan.environment, "REDIS_URL": store.start()}
        options = (*plan.options, "--log-dir", str(log_dir))
        with baton_up(*options, environment=environment, timeout_s=_START_TIMEOUT_S) as server:
            found["start s"] = round(server.start_s, 1)
            print(f"\n## {name}: ready after {server.start_s:.1f} s", flush=True)
            found["start"] = list(_start_events(log_dir))
            _show("start", START_COLUMNS, found["start"])
            with _client_logs(log_dir) if args.gaps else contextlib.nullcontext():
                asyncio.run(_measure(name, server, args, found, log_dir))
    finally:
        store.stop()


@contextlib.contextmanager
def _client_logs(log_dir: Path) -> Iterator[None]:
    """Of this process, and of one that has nothing to do."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with (log_dir / "client.log").open("w") as stream, (log_dir / "idle.log").open("w") as idle_stream:
        configure_logging("json", "DEBUG", stream, service="client")
        idle = subprocess.Popen([sys.executable, "-m", "benchmarks.idle_process"], stdout=idle_stream)
        try:
            yield
        finally:
            idle.kill()
            idle.wait()
            root.handlers[:] = handlers
            root.setLevel(level)


async def _measure(
    name: str, server: Server, args: argparse.Namespace, found: dict[str, Any], log_dir: Path
) -> None:
    reserve_descriptors()  # pauses of the client are not the server's
    with watched_loop():
        await _measure_parts(name, server, args, found, log_dir)


async def _measure_parts(
    name: str, server: Server, args: argparse.Namespace, found: dict[str, Any], log_dir: Path
) -> None:
    loads = TINY_LOADS if args.tiny else Loads()
    target = Target(url=server.url, model=SERVED_NAME, timeout_s=120.0)
    clients = Clients(server, target, loads, _scale(args).vocab_size)
    began = time.monotonic()
    await clients.warm_up()
    print(f"warmed up in {time.monotonic() - began:.1f} s", flush=True)
    for part in args.parts:
        rows = found.setdefault(part, [])
        _show(part, COLUMNS[part], [])
        async for row in _part(part, clients, args, loads, hands_off=name != "both"):
            if part == "sweep" and args.gaps:
                _show_gaps(clients.measured, log_dir)
            if part == "handoff":
                row = {"carrier": _last_carrier(log_dir), **row}
            rows.append(row)
            print(table(COLUMNS[part], [row])[-1], flush=True)


async def _part(
    part: str, clients: Clients, args: argparse.Namespace, loads: Loads, *, hands_off: bool
) -> Any:
    if part == "rows":
        for i in args.rows if args.rows is not None else range(len(loads.rows)):
            yield await clients.row(*loads.rows[i])
    elif part == "sweep":
        for rate in args.rates:
            yield await clients.sweep(rate, args.seconds)
    elif part == "isolation":
        for streams in loads.isolation_streams:
            for row in await clients.isolation(streams):
                yield row
    elif hands_off:
        yield await clients.handoff()
    else:
        yield await clients.without_handoff()


def _show_gaps(measured: Sequence[RequestMeasurement], log_dir: Path) -> None:
    steps = logged_steps(event for process, event in _log_events(log_dir) if process.startswith("decode"))
    gaps = longest_gaps([m for m in measured if m.class_name == "chat"], steps)
    _show("longest gaps of the chat requests below", CAUSE_COLUMNS, cause_rows(gaps))
    _show("the longest of all", LONGEST_COLUMNS, longest_rows(gaps))
    _show("all steps of decodes so far, by their number", STEP_COLUMNS, step_rows(steps))
    since = min(m.sent_at for m in measured)
    _show("the longest pauses of processes", PAUSE_COLUMNS, pause_rows(_log_events(log_dir), since))


def _show(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n" + "\n".join(table(columns, rows)), flush=True)


def _start_events(log_dir: Path) -> Iterator[dict[str, Any]]:
    """What took how long before the workers were ready."""
    for process, event in _log_events(log_dir):
        if event.get("event") == "start_phase":
            yield {"process": process, "event": event["phase"], "seconds": round(event["elapsed_s"], 2)}


def _last_carrier(log_dir: Path) -> str | None:
    committed = [e for _, e in _log_events(log_dir) if e.get("event") == "handoff_committed"]
    return committed[-1]["carrier"] if committed else None


def _log_events(log_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(process, event)"""
    for path in sorted(log_dir.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield path.stem, event


def _tails(log_dir: Path) -> Iterator[str]:
    for path in sorted(log_dir.glob("*.log")):
        yield f"--- {path.name}\n" + path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")


def _scale(args: argparse.Namespace) -> Scale:
    scale = TINY if args.tiny else Scale()
    shape = {**scale.shape, "baton_dummy_spread": args.weights}
    changes: dict[str, Any] = {"shape": shape, "fp8_weights": args.fp8, "kv_cache_dtype": args.kv_cache_dtype}
    if args.token_budget:
        changes["token_budget"] = args.token_budget
    if args.mixed_budget:
        changes["mixed_budget"] = args.mixed_budget
    if args.shared_prefill_budget:
        changes["shared_prefill_budget"] = args.shared_prefill_budget
    if args.shared_prefill_share:
        changes["shared_prefill_share"] = args.shared_prefill_share
    return replace(scale, **changes)


def _facts(args: argparse.Namespace) -> dict[str, str]:
    """Asked in a process of its own: a CUDA context here would take memory from the workers."""
    code = "import torch; print(torch.__version__, torch.cuda.device_count());"
    code += "print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, device = run.stdout.strip().splitlines()
    dtype = "FP8" if args.fp8 else _scale(args).dtype
    dtype += ", FP8 KV" * (args.kv_cache_dtype == "fp8")
    weights = f"{dtype}, {args.weights}"
    facts = {"device": device, "torch and number of devices": version, "weights": weights}
    options = " ".join(_options(args))
    return {**facts, "options": options} if options else facts


def _options(args: argparse.Namespace) -> Iterator[str]:
    """Those that change what is measured, where they are not the usual ones."""
    usual = vars(_arguments().parse_args(["run"]))
    for name, value in vars(args).items():
        if value != usual[name] and name not in ("json", "log_dir", "topologies", "parts", "carriers"):
            values = value if isinstance(value, list) else [] if value is True else [value]
            yield " ".join(["--" + name.replace("_", "-"), *map(str, values)])


def publish(path: Path) -> None:
    """A page a topology in benchmarks/results/."""
    document: Mapping[str, Any] = json.loads(path.read_text())
    facts = document["facts"]
    device = facts["device"].lower().replace(" ", "-")
    if facts["weights"].startswith("FP8"):
        device += "-fp8"
    notes = [*(f"{name}: {value}" for name, value in facts.items())]
    notes.append("the processor named above wrote this file; the figures are the device's")
    for name, found in document["topologies"].items():
        for part, columns in COLUMNS.items():
            if found.get(part):
                title = f"Served by {facts['device']}, topology {name}: {part}"
                print(write_result(f"gpu-serve-{device}-{name}-{part}", title, columns, found[part], notes))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_serve", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    modes = parser.add_subparsers(dest="mode", required=True)
    run = modes.add_parser("run")
    run.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=["both"])
    run.add_argument("--carriers", nargs="+", choices=tuple(CARRIERS), default=["ipc"])
    run.add_argument("--parts", nargs="+", choices=tuple(COLUMNS), default=list(COLUMNS))
    run.add_argument("--rows", type=int, nargs="+", help="of the table (default: all)")
    run.add_argument("--rates", type=float, nargs="+", default=[8.0, 16.0, 24.0, 32.0, 48.0])
    run.add_argument("--seconds", type=float, default=12.0, help="of each rate (default %(default)s)")
    run.add_argument(
        "--gaps", action="store_true", help="logs every step: what the longest gaps of a sweep were"
    )
    run.add_argument("--policy", help="of the router (default: the topology's)")
    run.add_argument("--fp8", action="store_true", help="weights in FP8")
    run.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    run.add_argument(
        "--weights", choices=DUMMY_SPREADS, default="variance", help="engine/checkpoint/dummy_weights.py"
    )
    run.add_argument("--token-budget", type=int, help="of a step (default: 8192)")
    run.add_argument("--mixed-budget", type=int, help="of it, for prompts beside decodes (default: 2048)")
    run.add_argument("--shared-prefill-budget", type=int, help="the same on a shared GPU (default: 1024)")
    run.add_argument("--shared-prefill-share", type=float, help="of the time on a shared GPU (default: 0.4)")
    run.add_argument("--json", type=Path)
    run.add_argument("--log-dir", type=Path, help="keep the logs of the processes there")
    run.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU: does it work?")
    modes.add_parser("publish").add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
