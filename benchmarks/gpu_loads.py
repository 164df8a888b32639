"""What benchmarks.gpu_serve sends, and what it reads off the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from baton.bench.load import Target, closed_sessions, measure, open_sessions
from baton.bench.measurement import RequestMeasurement, percentile, summarize
from baton.bench.workload import RequestClass, Workload, mixed_sessions, poisson_arrivals
from baton.http_client import HttpClient
from benchmarks.gpu_table import ROWS
from benchmarks.handoff import Sample, sample
from benchmarks.serving import Server
from servicekit.garbage import exempt_from_garbage_search

SLO_TTFT_S, SLO_TPOT_S = 1.0, 0.015
SWEEP_COLUMNS = (
    "rate",
    "good/s",
    "good share",
    "chat TTFT p50/p99 ms",
    "chat TPOT p50/p99 ms",
    "longest gap p99 ms",
    "long TTFT p50/p99 ms",
    "hit rate",
    "failed",
)
ISOLATION_COLUMNS = ("streams", "long prompts", "TPOT p50 ms", "TPOT p99 ms", "times", "longest gap p99 ms")
HANDOFF_COLUMNS = ("carrier", "prompt", "TTFT ms", "hand-off ms", "share of TTFT", "MB", "transfer ms")
ADDED_COLUMNS = ("topology", "carrier", "TTFT ms", "without ms", "hand-off ms", "share of TTFT without")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The issue's, or the same ones in small."""

    rows: tuple[tuple[int, int, int, int], ...] = ROWS
    warm_up: tuple[tuple[int, int, int, int], ...] = ((8, 1024, 8, 16), (2, 4096, 4, 4))
    chat: RequestClass = RequestClass(name="chat", weight=0.75, prompt_len=512, output_len=256)
    long: RequestClass = RequestClass(name="long", weight=0.25, prompt_len=4096, output_len=64)
    isolation_streams: tuple[int, ...] = (8, 32)
    isolation_requests: int = 4  # of each stream
    handoff_requests: int = 8


TINY_LOADS = Loads(
    rows=((1, 32, 8, 2), (4, 32, 8, 8)),
    warm_up=((2, 32, 2, 2),),
    chat=RequestClass(name="chat", weight=0.75, prompt_len=32, output_len=8),
    long=RequestClass(name="long", weight=0.25, prompt_len=128, output_len=4),
    isolation_streams=(2,),
    isolation_requests=2,
    handoff_requests=2,
)


class Clients:
    """Sends the loads to one server. No two prompts of a run are equal."""

    def __init__(self, server: Server, target: Target, loads: Loads, vocab_size: int) -> None:
        self._server = server
        self._target = target
        self._loads = loads
        self._vocab_size = vocab_size
        self._seed = 0
        self.measured: list[RequestMeasurement] = []  # of the last sweep

    async def warm_up(self) -> None:
        for row in self._loads.warm_up:
            await self.row(*row)

    async def row(self, concurrency: int, prompt: int, output: int, requests: int) -> dict[str, Any]:
        """A closed loop."""
        sessions = self._workload(requests, prompt, output).sessions()
        measured = await closed_sessions(self._target, sessions, concurrency)
        _check(measured)
        summary = summarize(measured)
        assert summary.ttft_ms is not None
        return {
            "concurrency": concurrency,
            "prompt": prompt,
            "output": output,
            "output tok/s": round(summary.output_tokens_per_s, 1),
            "prompt tok/s": round(summary.num_prompt_tokens / summary.duration_s),
            "TTFT p50 ms": round(summary.ttft_ms.p50, 1),
            "TPOT p50 ms": None if summary.tpot_ms is None else round(summary.tpot_ms.p50, 2),
        }

    async def sweep(self, rate: float, seconds: float) -> dict[str, Any]:
        """Poisson arrivals of both classes for so long. Good of those sent in that time, by that time."""
        loads, seed = self._loads, self._next_seed()
        num_requests = max(2, round(rate * seconds))
        sessions = mixed_sessions((loads.chat, loads.long), num_requests, self._vocab_size, seed)
        exempt_from_garbage_search()  # pauses of the client are not the server's
        measured = await open_sessions(self._target, sessions, poisson_arrivals(num_requests, rate, seed))
        self.measured = measured
        return sweep_row(rate, measured)

    async def isolation(self, streams: int) -> list[dict[str, Any]]:
        """Chat in a closed loop, alone and beside a constant stream of long prompts."""
        alone = isolation_row(streams, await self._chat(streams), num_long=0)
        stop = asyncio.Event()
        long_prompts = asyncio.create_task(self._long_prompts_until(stop))
        try:
            beside = await self._chat(streams)
        finally:
            stop.set()
            num_long = await long_prompts
        row = isolation_row(streams, beside, num_long=num_long)
        row["times"] = round(row["TPOT p99 ms"] / alone["TPOT p99 ms"], 2)
        return [alone, row]

    async def handoff(self) -> dict[str, Any]:
        """Long prompts, one at a time; the first one meets cold buffers."""
        prompt_len = self._loads.long.prompt_len
        prompts = self._workload(self._loads.handoff_requests + 1, prompt_len, 2).prompts()
        async with HttpClient(self._target.server) as client:
            samples = [await sample(client, self._target, self._server, ids, 2) for ids in prompts]
        return handoff_row(prompt_len, samples[1:])

    async def without_handoff(self) -> dict[str, Any]:
        """The same prompts, of a worker that keeps them."""
        prompt_len = self._loads.long.prompt_len
        prompts = self._workload(self._loads.handoff_requests + 1, prompt_len, 2).prompts()
        async with HttpClient(self._target.server) as client:
            measured = [await measure(client, self._target, ids, 2) for ids in prompts]
        _check(measured)
        ttft_ms = round(1e3 * median(m.ttft_s for m in measured[1:]), 2)
        return dict.fromkeys(HANDOFF_COLUMNS) | {"prompt": prompt_len, "TTFT ms": ttft_ms}

    async def _chat(self, streams: int) -> list[RequestMeasurement]:
        chat = self._loads.chat
        num_requests = streams * self._loads.isolation_requests
        sessions = self._workload(num_requests, chat.prompt_len, chat.output_len).sessions()
        measured = await closed_sessions(self._target, sessions, streams)
        _check(measured)
        return measured

    async def _long_prompts_until(self, stop: asyncio.Event) -> int:
        """Always one under way. How many."""
        num_sent = 0
        async with HttpClient(self._target.server) as client:
            while not stop.is_set():
                [prompt_ids] = self._workload(1, self._loads.long.prompt_len, 2).prompts()
                _check([await measure(client, self._target, prompt_ids, 2)])
                num_sent += 1
        return num_sent

    def _workload(self, num_requests: int, prompt_len: int, output_len: int) -> Workload:
        return Workload(
            num_requests=num_requests,
            prompt_len=prompt_len,
            output_len=output_len,
            vocab_size=self._vocab_size,
            seed=self._next_seed(),
        )

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def sweep_row(rate: float, measured: Sequence[RequestMeasurement]) -> dict[str, Any]:
    seconds = len(measured) / rate
    good = [m for m in measured if m.meets(SLO_TTFT_S, SLO_TPOT_S)]
    chat = [m for m in measured if m.is_ok and m.class_name == "chat"]
    long = [m for m in measured if m.is_ok and m.class_name == "long"]
    return {
        "rate": rate,
        "good/s": round(len(good) / seconds, 2),
        "good share": round(len(good) / len(measured), 3),
        "chat TTFT p50/p99 ms": _p50_p99([m.ttft_s for m in chat]),
        "chat TPOT p50/p99 ms": _p50_p99([m.tpot_s for m in chat if m.tpot_s is not None]),
        "longest gap p99 ms": _p99_ms(longest_gaps_s(chat)),
        "long TTFT p50/p99 ms": _p50_p99([m.ttft_s for m in long]),
        "hit rate": round(
            sum(m.num_hit_tokens for m in measured) / sum(m.num_prompt_tokens for m in measured), 3
        ),
        "failed": sum(not m.is_ok for m in measured),
    }


def isolation_row(streams: int, measured: Sequence[RequestMeasurement], *, num_long: int) -> dict[str, Any]:
    tpots = sorted(1e3 * m.tpot_s for m in measured if m.tpot_s is not None)
    return {
        "streams": streams,
        "long prompts": num_long,
        "TPOT p50 ms": round(percentile(tpots, 50), 2),
        "TPOT p99 ms": round(percentile(tpots, 99), 2),
        "times": 1.0,
        "longest gap p99 ms": _p99_ms(longest_gaps_s(measured)),
    }


def handoff_row(prompt_len: int, samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "prompt": prompt_len,
        "TTFT ms": round(1e3 * median(s.ttft_s for s in samples), 2),
        "hand-off ms": round(1e3 * median(s.handoff_s for s in samples), 2),
        "share of TTFT": round(median(s.handoff_s / s.ttft_s for s in samples), 3),
        "MB": round(median(s.num_bytes for s in samples) / 1e6, 1),
        "transfer ms": round(1e3 * median(s.transfer_s for s in samples), 2),
    }


def added_rows(topologies: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each topology with a hand-off."""
    [local] = topologies.get("both", {}).get("handoff") or [None]
    without_ms = local and local["TTFT ms"]
    return [
        {
            "topology": name,
            "carrier": row["carrier"],
            "TTFT ms": row["TTFT ms"],
            "without ms": without_ms,
            "hand-off ms": row["hand-off ms"],
            "share of TTFT without": without_ms and round(row["hand-off ms"] / without_ms, 3),
        }
        for name, found in topologies.items()
        for row in found.get("handoff", ())
        if row is not local
    ]


def longest_gaps_s(measured: Sequence[RequestMeasurement]) -> list[float]:
    """One a request of two chunks or more."""
    gaps = [m.itl_s for m in measured if m.is_ok]
    return [max(own) for own in gaps if own]


def _check(measured: Sequence[RequestMeasurement]) -> None:
    for m in measured:
        if not m.is_ok:
            raise RuntimeError(f"a request failed: {m.error or 'no token came'}")


def _p99_ms(values_s: Sequence[float]) -> float | None:
    return round(1e3 * percentile(sorted(values_s), 99), 2) if values_s else None


def _p50_p99(values_s: Sequence[float]) -> str | None:
    if not values_s:
        return None
    ordered = sorted(values_s)
    return " / ".join(f"{1e3 * percentile(ordered, percent):.1f}" for percent in (50, 99))
