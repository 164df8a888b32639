"""Sends a workload: closed loop (so many streams at once) or open loop (at given times)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from baton.bench.measurement import RequestMeasurement
from baton.http_client import HttpClient, HttpStatusError, NoAnswer

OnDone = Callable[[RequestMeasurement], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    url: str
    model: str
    output_len: int
    timeout_s: float = 600.0

    def payload(self, prompt_ids: Sequence[int]) -> bytes:
        return orjson.dumps(
            {
                "model": self.model,
                "prompt": list(prompt_ids),
                "max_tokens": self.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


async def served_model(url: str) -> str:
    """The first model that the server lists. Raises what HttpClient raises, ValueError if it lists none."""
    async with HttpClient(url) as client:
        listing = await client.get_json("/v1/models")
    models = [str(entry["id"]) for entry in listing.get("data", [])]
    if not models:
        raise ValueError(f"{url} lists no model")
    return models[0]


async def closed_loop(
    target: Target, prompts: Sequence[Sequence[int]], concurrency: int, on_done: OnDone | None = None
) -> list[RequestMeasurement]:
    """`concurrency` streams; each sends its next request when the one before has ended."""
    waiting = iter(prompts)
    measurements: list[RequestMeasurement] = []

    async def stream() -> None:
        async with HttpClient(target.url) as client:
            for prompt_ids in waiting:
                measurements.append(await measure(client, target, prompt_ids))
                if on_done:
                    on_done(measurements[-1])

    async with asyncio.TaskGroup() as streams:
        for _ in range(min(concurrency, len(prompts))):
            streams.create_task(stream())
    return measurements


async def open_loop(
    target: Target,
    prompts: Sequence[Sequence[int]],
    arrivals_s: Sequence[float],
    on_done: OnDone | None = None,
) -> list[RequestMeasurement]:
    """Request i is sent `arrivals_s[i]` seconds after the start, whether or not others have ended."""
    idle: list[HttpClient] = []
    measurements: list[RequestMeasurement] = []
    start = time.perf_counter()

    async def one(prompt_ids: Sequence[int]) -> None:
        client = idle.pop() if idle else HttpClient(target.url)
        try:
            measurements.append(await measure(client, target, prompt_ids))
        finally:
            idle.append(client)
        if on_done:
            on_done(measurements[-1])

    try:
        async with asyncio.TaskGroup() as requests:
            for prompt_ids, arrival_s in zip(prompts, arrivals_s, strict=True):
                await asyncio.sleep(max(0.0, start + arrival_s - time.perf_counter()))
                requests.create_task(one(prompt_ids))
    finally:
        for client in idle:
            client.close()
    return measurements


async def measure(client: HttpClient, target: Target, prompt_ids: Sequence[int]) -> RequestMeasurement:
    """One request. A failure is recorded, not raised."""
    payload = target.payload(prompt_ids)
    measurement = RequestMeasurement(sent_at=time.perf_counter(), num_prompt_tokens=len(prompt_ids))
    usage: dict[str, Any] = {}

    def on_event(data: bytes, read_at: float) -> None:
        event = orjson.loads(data)
        if event.get("error"):
            error = event["error"]
            measurement.error = str(error.get("message", error) if isinstance(error, dict) else error)
        if event.get("usage"):
            usage.update(event["usage"])
        if brings_token(event):
            measurement.chunk_times.append(read_at)

    try:
        await client.post_stream("/v1/completions", payload, on_event, target.timeout_s)
    except (HttpStatusError, NoAnswer) as error:
        measurement.error = str(error)
    measurement.num_output_tokens = int(usage.get("completion_tokens") or len(measurement.chunk_times))
    details = usage.get("prompt_tokens_details") or {}
    measurement.num_hit_tokens = int(details.get("cached_tokens") or 0)
    return measurement


def brings_token(event: dict[str, Any]) -> bool:
    """Whether a completion chunk stands for new tokens.

    An empty text still does while the stream goes on: a token may end inside a character. The closing chunks
    that only carry a finish reason or usage do not.
    """
    choices = event.get("choices")
    if not choices:
        return False
    choice = choices[0]
    return bool(choice.get("text")) or choice.get("finish_reason") is None
