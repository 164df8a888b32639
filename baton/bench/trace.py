"""Traces in Mooncake's JSON-lines format, read, written, made, and turned into prompts.

A line is one request: `timestamp` (ms since the first), `input_length` and `output_length` (tokens), and
`hash_ids`, one id for each block of 512 prompt tokens, the last block perhaps not full. An id stands for
its block and everything before it: equal ids mean equal prompts up to there.
Format: "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", arXiv 2407.00079, section 4.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from baton.bench.workload import Session, check_vocabulary, random_ids, single_turn

BLOCK_TOKENS = 512
_MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    timestamp_ms: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How a trace becomes prompts; what leaves the bounds is left out or cut."""

    time_scale: float = 1.0  # 0.5: twice as fast
    length_scale: float = 1.0  # of prompts, answers and blocks alike, so that shares stay
    max_requests: int = 1_000
    max_duration_s: float = 600.0  # of arrivals, after scaling
    max_prompt_len: int | None = None  # longer prompts lose their end
    vocab_size: int = 4_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.time_scale < 0 or self.length_scale <= 0:
            raise ValueError("scales of a trace: time must not be negative, length must be over 0")
        if self.max_requests < 1 or self.max_duration_s < 0:
            raise ValueError("bounds of a trace: at least one request, no negative duration")
        if self.max_prompt_len is not None and self.max_prompt_len < 1:
            raise ValueError(f"longest prompt {self.max_prompt_len}: must be at least 1")
        check_vocabulary(self.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceShape:
    """Of a made trace: conversations that begin at random moments with one of a few system prompts."""

    num_requests: int
    requests_per_s: float
    num_groups: int = 8  # system prompts
    system_blocks: int = 4
    mean_turns: float = 3.0  # of a conversation, geometric
    mean_prompt_len: int = 700  # new tokens of a turn, exponential
    mean_output_len: int = 180
    mean_think_s: float = 20.0
    max_input_length: int = 16_384  # a conversation that would get longer ends
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_requests, self.num_groups, self.mean_prompt_len, self.mean_output_len)
        if min(sizes) < 1 or self.system_blocks < 0:
            raise ValueError("numbers and mean lengths of a trace must be at least 1")
        if self.requests_per_s <= 0 or self.mean_turns < 1 or self.mean_think_s < 0:
            raise ValueError("rate of a trace must be over 0, its turns at least 1, think time not negative")
        if self.max_input_length <= self.system_blocks * BLOCK_TOKENS:
            raise ValueError("longest input of a trace: must be over its system prompt")


def read_trace(path: Path, max_requests: int | None = None) -> list[TraceRequest]:
    """The first requests by line. ValueError names the line that is wrong; OSError."""
    requests: list[TraceRequest] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
            if max_requests is not None and len(requests) >= max_requests:
                break
            if line.strip():
                requests.append(_request(line, f"{path.name}:{number}"))
    return requests


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    with path.open("wb") as file:
        for r in requests:
            line = {
                "timestamp": r.timestamp_ms,
                "input_length": r.input_length,
                "output_length": r.output_length,
                "hash_ids": list(r.hash_ids),
            }
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def replay(requests: Sequence[TraceRequest], how: Replay) -> tuple[list[Session], list[float]]:
    """Sessions of one turn and their arrivals in seconds, ascending, the first at 0. ValueError when none
    is left."""
    ordered = sorted(requests, key=lambda r: r.timestamp_ms)[: how.max_requests]
    sessions: list[Session] = []
    arrivals_s: list[float] = []
    for request in ordered:
        arrival_s = (request.timestamp_ms - ordered[0].timestamp_ms) / 1000 * how.time_scale
        if arrival_s > how.max_duration_s:
            break
        output_len = max(1, round(request.output_length * how.length_scale))
        sessions.append(single_turn(_prompt_ids(request, len(sessions), how), output_len))
        arrivals_s.append(arrival_s)
    if not sessions:
        raise ValueError("the trace holds no request")
    return sessions, arrivals_s


def make_trace(shape: TraceShape) -> list[TraceRequest]:
    """Deterministic by seed, ordered by time."""
    draw = random.Random(shape.seed)
    next_id = shape.num_groups * shape.system_blocks
    requests: list[TraceRequest] = []
    times_ms: list[int] = []  # a heap of those that later conversations may still come before
    num_settled = 0
    starts_s = 0.0
    while num_settled < shape.num_requests:
        starts_s += draw.expovariate(shape.requests_per_s / shape.mean_turns)
        while times_ms and times_ms[0] <= starts_s * 1000:
            heapq.heappop(times_ms)
            num_settled += 1
        turns = _conversation(draw, shape, starts_s, next_id)
        next_id = max([next_id, *(max(turn.hash_ids, default=0) + 1 for turn in turns)])
        requests += turns
        for turn in turns:
            heapq.heappush(times_ms, turn.timestamp_ms)
    ordered = sorted(requests, key=lambda r: r.timestamp_ms)[: shape.num_requests]
    return [replace(r, timestamp_ms=r.timestamp_ms - ordered[0].timestamp_ms) for r in ordered]


def _conversation(
    draw: random.Random, shape: TraceShape, starts_s: float, next_id: int
) -> list[TraceRequest]:
    group = draw.randrange(shape.num_groups)
    full_ids = list(range(group * shape.system_blocks, (group + 1) * shape.system_blocks))
    num_tokens = len(full_ids) * BLOCK_TOKENS
    at_s = starts_s
    turns: list[TraceRequest] = []
    while True:
        num_tokens += 1 + int(draw.expovariate(1 / shape.mean_prompt_len))
        if num_tokens > shape.max_input_length:
            return turns
        while len(full_ids) < num_tokens // BLOCK_TOKENS:
            full_ids.append(next_id)
            next_id += 1
        partial = []
        if num_tokens % BLOCK_TOKENS:  # it will be full, and another block, in the next turn
            partial.append(next_id)
            next_id += 1
        output_length = 1 + int(draw.expovariate(1 / shape.mean_output_len))
        turns.append(
            TraceRequest(
                timestamp_ms=round(at_s * 1000),
                input_length=num_tokens,
                output_length=output_length,
                hash_ids=(*full_ids, *partial),
            )
        )
        num_tokens += output_length
        if draw.random() < 1 / shape.mean_turns:
            return turns
        at_s += draw.expovariate(1 / shape.mean_think_s) if shape.mean_think_s else 0.0


def _prompt_ids(request: TraceRequest, index: int, how: Replay) -> list[int]:
    block_len = max(1, round(BLOCK_TOKENS * how.length_scale))
    length = max(1, round(request.input_length * how.length_scale))
    if how.max_prompt_len is not None:
        length = min(length, how.max_prompt_len)
    ids: list[int] = []
    for hash_id in request.hash_ids:
        if len(ids) >= length:
            break
        draw = random.Random(f"block-{how.seed}-{hash_id}")
        ids += random_ids(draw, block_len, how.vocab_size)
    # A line may name fewer blocks than its prompt has: the rest is nobody else's.
    draw = random.Random(f"rest-{how.seed}-{index}")
    ids += random_ids(draw, max(0, length - len(ids)), how.vocab_size)
    return ids[:length]


def _request(line: bytes, where: str) -> TraceRequest:
    try:
        fields: dict[str, Any] = orjson.loads(line)
        request = TraceRequest(
            timestamp_ms=int(fields["timestamp"]),
            input_length=int(fields["input_length"]),
            output_length=int(fields["output_length"]),
            hash_ids=tuple(int(hash_id) for hash_id in fields.get("hash_ids") or ()),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: not a line of a Mooncake trace ({error})") from error
    if request.timestamp_ms < 0 or request.input_length < 1 or request.output_length < 0:
        raise ValueError(f"{where}: time and lengths must not be negative")
    return request
