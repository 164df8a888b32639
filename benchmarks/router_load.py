"""A router under load: latency that it adds at 70 % of what it can do, a thousand streams, more processes.

    python -m benchmarks.router_load [--write]

The same processes as in benchmarks/router_overhead.py: real routers, a worker that only makes tokens, and a
bare uvicorn application as the limit.

- added latency: requests of one token at random times (Poisson), 70 % of the rate that a closed loop of 32
  reached; to the router and to the bare application, and the difference.
- streams: a thousand at once for some seconds; how many ended early, and the router's memory before, in the
  middle and after.
- processes: tokens a second of one router and of two, at as many streams as the closed loop has clients.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence

import psutil

from baton.bench.measurement import percentile
from benchmarks.results_file import table, write_result
from benchmarks.router_overhead import Client, running_bare, running_routers
from servicekit.descriptors import reserve_descriptors
from servicekit.garbage import exempt_from_garbage_search

COLUMNS = ("what", "value")
LOAD = 0.7
NUM_CLOSED = 32
Rows = list[dict[str, str | float]]


async def connected(ports: Sequence[int], count: int, prompt_len: int) -> list[Client]:
    prompt = [70 + i % 100 for i in range(prompt_len)]
    clients = [Client(ports[index % len(ports)], prompt) for index in range(count)]
    for client in clients:
        await client.connect()
    return clients


async def closed_rate(clients: Sequence[Client], num_tokens: int, seconds: float) -> float:
    """Requests a second, each client one after the other."""
    end_at = time.monotonic() + seconds
    num_done = 0

    async def visit(client: Client) -> None:
        nonlocal num_done
        while time.monotonic() < end_at:
            await client.stream(num_tokens)
            num_done += 1

    await asyncio.gather(*(visit(client) for client in clients))
    return num_done / seconds


async def open_latencies(clients: list[Client], rate_per_s: float, seconds: float) -> list[float]:
    """Milliseconds from the moment a request should have been sent to its last byte, ascending.

    A request that finds no free connection waits for one: a server that cannot keep up shows it.
    """
    rng = random.Random(1)
    idle: asyncio.Queue[Client] = asyncio.Queue()
    for client in clients:
        idle.put_nowait(client)
    latencies = []

    async def one(due_at: float) -> None:
        client = await idle.get()
        await client.stream(1)
        latencies.append((time.perf_counter() - due_at) * 1000)
        idle.put_nowait(client)

    due_at = end_at = time.perf_counter()
    end_at += seconds
    async with asyncio.TaskGroup() as requests:
        while (due_at := due_at + rng.expovariate(rate_per_s)) < end_at:
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            requests.create_task(one(due_at))
    return sorted(latencies)


async def bench_latency(options: argparse.Namespace) -> Rows:
    async with running_routers(options, [options.port], 1.0), running_bare(options.port + 1, 1.0):
        found = {}
        rate = 0.0
        for name, port in (("router", options.port), ("bare", options.port + 1)):
            clients = await connected([port], 512, options.prompt_len)
            closed = await closed_rate(clients[:NUM_CLOSED], 1, options.seconds / 2)
            rate = rate or closed  # the router's own, for both
            found[name] = await open_latencies(clients, LOAD * rate, options.seconds)
    rows: Rows = [{"what": "requests/s, closed loop", "value": rate}]
    for percent in (50, 99):
        values = {name: percentile(latencies, percent) for name, latencies in found.items()}
        rows += [{"what": f"p{percent} ms at 70 %, {name}", "value": value} for name, value in values.items()]
        rows.append({"what": f"p{percent} ms at 70 %, added", "value": values["router"] - values["bare"]})
    return rows


async def bench_streams(options: argparse.Namespace) -> Rows:
    async with running_routers(options, [options.port], options.step_ms) as [router]:
        clients = await connected([options.port], options.streams, options.prompt_len)
        await clients[0].stream(8)
        mib = [_mib(router)]
        streams = [asyncio.create_task(client.stream(options.tokens)) for client in clients]
        for share in (0.5, 0.9):
            await asyncio.sleep(options.tokens * options.step_ms / 1000 * (share if len(mib) == 1 else 0.4))
            mib.append(_mib(router))
        results = await asyncio.gather(*streams, return_exceptions=True)
        mib.append(_mib(router))
    num_whole = sum(isinstance(chunks, int) and chunks >= options.tokens - 8 for chunks in results)
    rows: Rows = [{"what": "streams at once", "value": options.streams}]
    rows.append({"what": "streams cut", "value": options.streams - num_whole})
    names = ("before", "half way", "at nine tenths", "after")
    return rows + [{"what": f"router's memory {n}, MiB", "value": v} for n, v in zip(names, mib, strict=True)]


async def bench_processes(options: argparse.Namespace) -> Rows:
    rows: Rows = []
    for count in (1, 2):
        ports = [options.port + index for index in range(count)]
        async with running_routers(options, ports, 1.0):
            clients = await connected(ports, 64, options.prompt_len)
            rate = await closed_rate(clients, options.tokens, options.seconds)
        rows.append({"what": f"tokens/s, {count} router process(es)", "value": rate * options.tokens})
    return rows


def _mib(process: psutil.Process) -> float:
    return process.memory_info().rss / (1 << 20)


async def run(options: argparse.Namespace) -> None:
    rows = await bench_latency(options)
    rows += await bench_streams(options)
    rows += await bench_processes(options)
    print(*table(COLUMNS, rows), sep="\n")
    if options.write:
        notes = [
            f"prompts of {options.prompt_len} tokens; streams of {options.tokens} tokens, one in "
            f"{options.step_ms:g} ms; routers, worker and client share the machine",
        ]
        print(write_result("router-load", "A router under load", COLUMNS, rows, notes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=100.0, help="between the tokens of a stream")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--port", type=int, default=18440)
    parser.add_argument("--write", action="store_true", help="JSON and Markdown into benchmarks/results")
    options = parser.parse_args()
    reserve_descriptors()
    exempt_from_garbage_search()  # the client's pauses are not the router's
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
