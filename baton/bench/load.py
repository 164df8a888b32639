"""Sends sessions: closed loop (so many at once) or open loop (at given times)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from baton.bench.measurement import RequestMeasurement
from baton.bench.workload import Session, single_turn
from baton.http_client import HttpClient, HttpStatusError, NoAnswer, Server

OnDone = Callable[[RequestMeasurement], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    url: str
    model: str
    output_len: int = 16  # where a request does not say its own
    timeout_s: float = 600.0
    wants_output_ids: bool = False
    api_key: str | None = field(default=None, repr=False)

    @property
    def server(self) -> Server:
        return Server(self.url, self.api_key)

    def payload(self, prompt_ids: Sequence[int], output_len: int | None = None) -> bytes:
        return orjson.dumps(
            {
                "model": self.model,
                "prompt": list(prompt_ids),
                "max_tokens": output_len or self.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"return_token_ids": True} if self.wants_output_ids else {}),
            }
        )


async def served_model(server: Server | str) -> str:
    """The first model that the server lists. Raises what HttpClient raises, ValueError if it lists none."""
    async with HttpClient(server) as client:
        listing = await client.get_json("/v1/models")
    models = [str(entry["id"]) for entry in listing.get("data", [])]
    if not models:
        raise ValueError(f"{server} lists no model")
    return models[0]


async def closed_loop(
    target: Target, prompts: Sequence[Sequence[int]], concurrency: int, on_done: OnDone | None = None
) -> list[RequestMeasurement]:
    """`concurrency` streams; each sends its next request when the one before has ended."""
    sessions = [single_turn(prompt_ids, target.output_len) for prompt_ids in prompts]
    return await closed_sessions(target, sessions, concurrency, on_done)


async def closed_sessions(
    target: Target, sessions: Sequence[Session], concurrency: int, on_done: OnDone | None = None
) -> list[RequestMeasurement]:
    """`concurrency` sessions at once; the next one begins when one has ended."""
    waiting = iter(sessions)
    measurements: list[RequestMeasurement] = []

    async def stream() -> None:
        async with HttpClient(target.server) as client:
            for session in waiting:
                await _converse(client, target, session, measurements, on_done)

    async with asyncio.TaskGroup() as streams:
        for _ in range(min(concurrency, len(sessions))):
            streams.create_task(stream())
    return measurements


async def open_loop(
    target: Target,
    prompts: Sequence[Sequence[int]],
    arrivals_s: Sequence[float],
    on_done: OnDone | None = None,
) -> list[RequestMeasurement]:
    """Request i is sent `arrivals_s[i]` seconds after the start, whether or not others have ended."""
    sessions = [single_turn(prompt_ids, target.output_len) for prompt_ids in prompts]
    return await open_sessions(target, sessions, arrivals_s, on_done)


async def open_sessions(
    target: Target,
    sessions: Sequence[Session],
    arrivals_s: Sequence[float],
    on_done: OnDone | None = None,
) -> list[RequestMeasurement]:
    """Session i begins `arrivals_s[i]` seconds after the start, whether or not others have ended."""
    idle: list[HttpClient] = []
    measurements: list[RequestMeasurement] = []
    start = time.perf_counter()

    async def one(session: Session) -> None:
        client = idle.pop() if idle else HttpClient(target.server)
        try:
            await _converse(client, target, session, measurements, on_done)
        finally:
            idle.append(client)

    try:
        async with asyncio.TaskGroup() as running:
            for session, arrival_s in zip(sessions, arrivals_s, strict=True):
                await asyncio.sleep(max(0.0, start + arrival_s - time.perf_counter()))
                running.create_task(one(session))
    finally:
        for client in idle:
            client.close()
    return measurements


async def _converse(
    client: HttpClient,
    target: Target,
    session: Session,
    measurements: list[RequestMeasurement],
    on_done: OnDone | None,
) -> None:
    """Turn after turn; a session whose request failed ends, since its next prompt cannot be known. A server
    that does not give the ids of its answers gets prompts without them."""
    if session.num_requests > 1:
        target = replace(target, wants_output_ids=True)
    history: list[int] = []
    for turn in session.turns:
        await asyncio.sleep(turn.think_s)
        history += turn.new_ids
        measurement = await measure(client, target, history, turn.output_len)
        measurement.class_name = session.class_name
        measurements.append(measurement)
        if on_done:
            on_done(measurement)
        if not measurement.is_ok:
            return
        history += measurement.output_ids


async def measure(
    client: HttpClient, target: Target, prompt_ids: Sequence[int], output_len: int | None = None
) -> RequestMeasurement:
    """One request of `output_len` tokens, or the target's. A failure is recorded, not raised."""
    payload = target.payload(prompt_ids, output_len)
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
        if target.wants_output_ids:
            for choice in event.get("choices", ()):
                measurement.output_ids += choice.get("token_ids") or ()

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
