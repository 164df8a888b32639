"""What workers tell on their /state page, asked only while somebody looks."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

import httpx
import orjson

from kvstore.worker_record import WorkerRecord

_PERIOD_S = 2.0
_TIMEOUT_S = 1.5
_MAX_BYTES = 2 << 20  # of one answer
_MAX_CONCURRENT = 16
_MAX_EXPERT_WORKERS = 8  # of each role: their sum stands for all
_CELLS_PER_MEAN = 32  # of the heat map, one byte each: 32 is the mean of its layer, 255 about 8 times that


@dataclass(slots=True)
class WorkerStates:
    """As of the last round."""

    tiers: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # worker id -> tier -> blocks
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)  # role -> heat map
    num_rounds: int = 0


class WorkerStateReader:
    def __init__(self, workers: Callable[[], Sequence[WorkerRecord]]) -> None:
        self.states = WorkerStates()  # replaced by every round
        self._workers = workers

    async def run(self) -> None:
        """Until cancelled."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
            while True:
                await self._read_all(client)
                await asyncio.sleep(_PERIOD_S)

    async def _read_all(self, client: httpx.AsyncClient) -> None:
        workers = [worker for worker in self._workers() if worker.metrics_address]
        slots = asyncio.Semaphore(_MAX_CONCURRENT)
        pages = await asyncio.gather(*(_read(client, slots, worker.metrics_address) for worker in workers))
        num_rounds = self.states.num_rounds + 1
        self.states = await asyncio.to_thread(_merged, workers, pages, num_rounds)


async def _read(client: httpx.AsyncClient, slots: asyncio.Semaphore, address: str) -> bytes:
    """Empty when the worker does not answer, or with too much."""
    body = bytearray()
    try:
        async with slots, client.stream("GET", f"http://{address}/state") as response:
            if response.status_code == 200:
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _MAX_BYTES:
                        return b""
    except (httpx.HTTPError, httpx.InvalidURL):
        return b""
    return bytes(body)


def _merged(workers: Sequence[WorkerRecord], pages: Sequence[bytes], num_rounds: int) -> WorkerStates:
    states = WorkerStates(num_rounds=num_rounds)
    loads: dict[str, list[list[list[int]]]] = {"prefill": [], "decode": []}
    for worker, page in zip(workers, pages, strict=True):
        parsed = _parsed(page)
        states.tiers[worker.worker_id] = _tiers(parsed.get("tiers"))
        experts = parsed.get("experts")
        if experts and len(loads[worker.role]) < _MAX_EXPERT_WORKERS:
            loads[worker.role].append(experts)
    states.experts = {role: heat_map(each) for role, each in loads.items() if each}
    return states


def _parsed(page: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(page) if page else {}
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _tiers(value: Any) -> dict[str, dict[str, int]]:
    if not isinstance(value, dict):
        return {}
    return {
        str(tier): {key: int(blocks.get(key, 0)) for key in ("total", "used", "cached")}
        for tier, blocks in value.items()
        if isinstance(blocks, dict)
    }


def heat_map(loads: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """From [worker][moe layer][expert] tokens; workers of another shape than the first are left out.

    `cells`: base64 of a byte for each layer and expert, load relative to the layer's mean.
    """
    shape = [len(layer) for layer in loads[0]]
    alike = [each for each in loads if [len(layer) for layer in each] == shape]
    cells = bytearray()
    num_tokens = 0
    for layers in zip(*alike, strict=True):
        total = list(layers[0])
        for layer in layers[1:]:
            total = list(map(add, total, layer))
        layer_tokens = sum(total)
        num_tokens += layer_tokens
        scale = _CELLS_PER_MEAN * len(total) / layer_tokens if layer_tokens else 0.0
        cells += bytes(min(255, round(load * scale)) for load in total)
    return {
        "num_layers": len(shape),
        "num_experts": shape[0] if shape else 0,
        "num_tokens": num_tokens,
        "cells_per_mean": _CELLS_PER_MEAN,
        "cells": base64.b64encode(cells).decode(),
    }
