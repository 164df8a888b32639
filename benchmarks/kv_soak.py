"""A day of random traffic in minutes: does anything leak?

    python -m benchmarks.kv_soak [--hours 24] [--quick]

Real engines on a fake model, a real Redis, a router's mirror of the index; chats come, think, are cancelled,
are handed off between workers, and workers are restarted, half of them without a word to Redis. A simulated
second is one step of every worker. Checked again and again: free + cached + used = total on every worker;
Redis, the mirror and that of a router that starts now hold exactly the blocks that the workers have; sampled
answers are what a cache without a wrong block gives. Checked in the end: memory of Redis and size of the
mirror did not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.plots import plot_lines
from benchmarks.results_file import result_path, write_result
from benchmarks.simulated_fleet import Fleet, Request, check_blocks
from benchmarks.simulated_traffic import Traffic, TrafficShape
from engine.engine import Engine
from kvstore.embedded import EmbeddedServer
from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex
from kvstore.store import Store

# The fakes of the tests are what a simulation needs; neither they nor benchmarks are ever installed.
from tests.fakes.fake_model import build_fake_engine, expected_tokens

MODEL = "soak"
TICK_S = 1.0
MIRROR_TICKS = 5  # between two looks of the router at the events
COLUMNS = ("hour", "requests", "hit rate", "Redis KB", "Redis keys", "mirror blocks", "process MB")
FLAT = 1.15  # times the level of the first half that the last quarter may reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    hours: float = 24.0
    num_workers: int = 4
    check_every_s: int = 600  # simulated
    restart_every_s: int = 900  # one worker of the fleet, simulated
    verified: float = 0.02  # share of answers that are computed again without a cache
    seed: int = 0
    shape: TrafficShape = TrafficShape()

    @property
    def num_ticks(self) -> int:
        return round(self.hours * 3600 / TICK_S)


def build_engine() -> Engine:
    """Small enough to evict all the time and to preempt at times."""
    return build_fake_engine(num_blocks=192, token_budget=96, max_running=12, max_model_len=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    hour: float
    num_requests: int  # finished since the sample before
    hit_rate: float  # of them, over tokens
    redis_bytes: int
    num_redis_keys: int
    num_mirror_blocks: int
    process_bytes: int  # of this process: engines, mirror and simulation

    def row(self) -> dict[str, Any]:
        values = (
            round(self.hour, 2),
            self.num_requests,
            round(self.hit_rate, 3),
            self.redis_bytes / 1e3,
            self.num_redis_keys,
            self.num_mirror_blocks,
            self.process_bytes / 1e6,
        )
        return dict(zip(COLUMNS, values, strict=True))


class Simulation:
    """Owns fleet, mirror and traffic from run() to its end."""

    def __init__(self, url: str, soak: Soak, build: Callable[[], Engine] = build_engine) -> None:
        self._soak = soak
        self._store = Store(url)
        self.index = MemoryIndex()
        self._mirror = IndexMirror(self._store, MODEL, self.index)
        self._build = build
        self._draw = random.Random(f"soak-{soak.seed}")
        self.num_verified = 0
        self.num_restarts = 0
        self.samples: list[Sample] = []

    async def run(self, on_sample: Callable[[Sample], None] | None = None) -> None:
        """AssertionError as soon as something does not add up."""
        soak = self._soak
        self.fleet = Fleet(self._store, MODEL, soak.num_workers, self._build)
        chain = next(iter(self.fleet.workers.values())).engine.hash_chain
        self.traffic = Traffic(self.fleet, self.index, chain, soak.shape, soak.seed)
        try:
            for tick in range(1, soak.num_ticks + 1):
                await self._tick(tick)
                if tick % soak.check_every_s == 0:
                    self.samples.append(await self._check(tick))
                    if on_sample:
                        on_sample(self.samples[-1])
            for request in self.fleet.requests():
                self.fleet.cancel(request)
            await self._check(soak.num_ticks)
        finally:
            await self.fleet.stop()
            await self._store.close()

    async def _tick(self, tick: int) -> None:
        self.traffic.tick(TICK_S)
        self.fleet.step()
        if tick % self._soak.restart_every_s == 0:
            worker_id = self._draw.choice(list(self.fleet.workers))
            await self.fleet.restart(worker_id, crashes=self._draw.random() < 0.5)
            self.num_restarts += 1
        await asyncio.sleep(0)  # the writers of the index
        if tick % MIRROR_TICKS == 0:
            await self._mirror.catch_up()

    async def _check(self, tick: int) -> Sample:
        self.fleet.settle()
        check_blocks(self.fleet)
        self.num_verified += verify(self.traffic.finished, self._draw, self._soak.verified)
        async with asyncio.timeout(30):
            for worker in self.fleet.workers.values():
                await worker.index.flush()
        await self._mirror.catch_up()
        check_index(self.fleet, self.index)
        of_new_router = MemoryIndex()
        await IndexMirror(self._store, MODEL, of_new_router).catch_up()
        check_index(self.fleet, of_new_router)
        return await self._sample(tick)

    async def _sample(self, tick: int) -> Sample:
        finished, self.traffic.finished = self.traffic.finished, []
        memory = await self._store.redis.info("memory")
        num_prompt_tokens = sum(len(r.prompt.token_ids) for r in finished)
        return Sample(
            hour=tick * TICK_S / 3600,
            num_requests=len(finished),
            hit_rate=sum(r.num_hit_tokens for r in finished) / max(1, num_prompt_tokens),
            redis_bytes=int(memory["used_memory"]),
            num_redis_keys=int(await self._store.redis.dbsize()),
            num_mirror_blocks=self.index.num_blocks,
            process_bytes=psutil.Process().memory_info().rss,
        )


def check_index(fleet: Fleet, index: MemoryIndex) -> None:
    """AssertionError when the mirror shows other blocks than the workers have."""
    for worker_id, worker in fleet.workers.items():
        shown, held = index.blocks(worker_id), set(worker.engine.cached_hashes())
        assert shown == held, (
            f"{worker_id}: {len(shown - held)} blocks too many and {len(held - shown)} too few of {len(held)}"
        )
    strangers = index.workers().keys() - fleet.workers.keys()
    assert not strangers, f"the mirror shows blocks of {strangers}"


def verify(finished: Sequence[Request], draw: random.Random, share: float) -> int:
    """How many answers were compared with what the model says without a cache."""
    sampled = [request for request in finished if draw.random() < share]
    for request in sampled:
        expected = expected_tokens(request.prompt.token_ids, len(request.output_ids))
        assert request.output_ids == expected, f"request {request.request_id} met a wrong block"
    return len(sampled)


def grown(values: Sequence[float]) -> float:
    """The highest of the last quarter over the highest of the first half's second part, where caches are
    full already."""
    quarter = len(values) // 4
    assert quarter >= 1, "too few samples"
    return max(values[-quarter:]) / max(values[quarter : 2 * quarter])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--hours", type=float, default=24.0, help="simulated (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two hours, no result file")
    args = parser.parse_args()
    soak = Soak(hours=2.0 if args.quick else args.hours, seed=args.seed)
    server = EmbeddedServer()
    began = time.monotonic()
    try:
        simulation = Simulation(server.start(), soak)
        asyncio.run(simulation.run(lambda s: print(s.row(), flush=True) if s.hour % 1 == 0 else None))
    finally:
        server.stop()
    growth = {
        "Redis memory": grown([s.redis_bytes for s in simulation.samples]),
        "mirror": grown([s.num_mirror_blocks for s in simulation.samples]),
    }
    facts = summary(simulation, soak, growth, time.monotonic() - began)
    print("\n".join(facts))
    if not args.quick:
        print(write(simulation.samples, facts))
    assert max(growth.values()) <= FLAT, f"grew: {growth}"


def summary(simulation: Simulation, soak: Soak, growth: dict[str, float], elapsed_s: float) -> list[str]:
    traffic = simulation.traffic
    return [
        f"{soak.hours:g} simulated hours in {elapsed_s:.0f} s: {traffic.num_sent} requests, "
        f"{traffic.num_cancelled} cancelled, {simulation.fleet.num_handoffs} handed off, "
        f"{simulation.num_restarts} restarts, {simulation.fleet.num_steps} steps",
        f"{simulation.num_verified} answers computed again without a cache, all the same; "
        f"{len(simulation.samples)} times everything added up",
        *(f"{name}: last quarter / second quarter = {value:.3f}" for name, value in growth.items()),
    ]


def write(samples: Sequence[Sample], facts: Sequence[str]) -> Path:
    plot = plot_lines(
        result_path("kv-soak", ".png"),
        "A simulated day",
        {
            "Redis, KB": [(s.hour, s.redis_bytes / 1e3) for s in samples],
            "mirror, blocks": [(s.hour, s.num_mirror_blocks) for s in samples],
        },
        ("simulated hours", "KB, blocks"),
    )
    hourly = [s.row() for s in samples if s.hour % 1 == 0]
    return write_result("kv-soak", "A day of random traffic, simulated", COLUMNS, hourly, facts, [plot])


if __name__ == "__main__":
    main()
