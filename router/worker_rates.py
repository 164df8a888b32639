"""What workers measured about themselves, made complete and comparable.

Where a worker has not measured something, the median of those that have stands in, or else an assumption.
A value close to the median is taken for the median: measurements are not better than that, and equal workers
must cost exactly the same so that they take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

from kvstore.worker_record import KvPath, WorkerRecord

_SAME_RATIO = 1.25


class KvCost(NamedTuple):
    """n bytes take latency_s + n * byte_s."""

    latency_s: float
    byte_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRates:
    """A step of p prompt tokens and d sequences takes step_s + p * prefill_token_s + d * decode_seq_s.

    The defaults are assumed as long as no worker has measured: those of a small model on few cores and of a
    slow network, so that nothing depends on luck before the first requests are through.
    """

    step_s: float = 0.01
    prefill_token_s: float = 0.001
    decode_seq_s: float = 0.001
    token_bytes: float = 0.0  # of KV
    is_measured: bool = False  # how fast prompts are computed, here or by another worker
    stream: KvCost = KvCost(0.005, 1 / 200e6)  # hand-off from another host
    shared_memory: KvCost = KvCost(0.003, 1 / 2e9)  # hand-off from the same host
    peer: KvCost = KvCost(0.005, 1 / 200e6)
    host: KvCost = KvCost(0.0005, 1 / 4e9)
    disk: KvCost = KvCost(0.002, 1 / 500e6)


ASSUMED = WorkerRates()
_PATHS: tuple[KvPath, ...] = ("stream", "shared_memory", "peer", "host", "disk")

Measure = Callable[[WorkerRecord], float | None]


def resolve_rates(records: Sequence[WorkerRecord]) -> list[WorkerRates]:
    """One for each record, in their order; the same whatever that order is."""
    step_s = _resolve(records, lambda record: record.load.step_s, ASSUMED.step_s)
    prefill_token_s = _resolve(records, _prefill_token_s, ASSUMED.prefill_token_s)
    decode_seq_s = _resolve(records, lambda record: record.load.decode_seq_s, ASSUMED.decode_seq_s)
    is_measured = any(_sane(_prefill_token_s(record)) is not None for record in records)
    paths = [_resolve_path(records, path) for path in _PATHS]
    return [
        WorkerRates(
            step_s=step_s[index],
            prefill_token_s=prefill_token_s[index],
            decode_seq_s=decode_seq_s[index],
            token_bytes=record.block_bytes / record.block_size,
            is_measured=is_measured,
            **{path: costs[index] for path, costs in zip(_PATHS, paths, strict=True)},
        )
        for index, record in enumerate(records)
    ]


def _prefill_token_s(record: WorkerRecord) -> float | None:
    load = record.load
    if load.prefill_token_s is None and load.prefill_tokens_per_s > 0:
        return 1 / load.prefill_tokens_per_s
    return load.prefill_token_s


def _resolve_path(records: Sequence[WorkerRecord], path: KvPath) -> list[KvCost]:
    def latency_s(record: WorkerRecord) -> float | None:
        rate = record.load.kv_rates.get(path)
        return None if rate is None else rate.latency_s

    def byte_s(record: WorkerRecord) -> float | None:
        rate = record.load.kv_rates.get(path)
        return None if rate is None or rate.bytes_per_s <= 0 else 1 / rate.bytes_per_s

    assumed: KvCost = getattr(ASSUMED, path)
    latencies = _resolve(records, latency_s, assumed.latency_s)
    return list(map(KvCost, latencies, _resolve(records, byte_s, assumed.byte_s)))


def _resolve(records: Sequence[WorkerRecord], measure: Measure, assumed: float) -> list[float]:
    measured = _pooled(records, [_sane(measure(record)) for record in records])
    known = [value for value in measured if value is not None]
    middle = median_low(known) if known else assumed
    low, high = middle / _SAME_RATIO, middle * _SAME_RATIO
    return [middle if value is None or low <= value <= high else value for value in measured]


def _pooled(records: Sequence[WorkerRecord], measured: Sequence[float | None]) -> list[float | None]:
    """Workers that compute on the processors of one host are equally fast. They differ by what they got of
    them while they measured, and who got less would be avoided for it."""
    places = [(record.host_id, record.cpu_share) for record in records]
    groups: dict[tuple[str, float], list[float]] = {}
    for place, value in zip(places, measured, strict=True):
        if all(place) and value is not None:
            groups.setdefault(place, []).append(value)
    medians = {place: median_low(values) for place, values in groups.items()}
    return [medians.get(place, value) for place, value in zip(places, measured, strict=True)]


def _sane(value: float | None) -> float | None:
    """Records come from other processes: a negative duration, or one that is no number, is none."""
    return value if value is not None and 0 <= value < float("inf") else None
