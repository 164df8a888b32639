"""What one request measured, and the latency terms as this project defines them.

TTFT: request sent -> first token here. TPOT, one value a request of n >= 2 tokens: (last - first) / (n - 1).
ITL, n - 1 values a request, pooled: a chunk of k tokens is one gap followed by k - 1 zeros.
E2E: sent -> last token.
Goodput: requests a second that meet both the TTFT and the TPOT limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestMeasurement:
    """Times are seconds of one monotonic clock; `chunk_times` has one entry a chunk that brought tokens."""

    sent_at: float
    chunk_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # the server's usage when it gives one, else the number of chunks
    num_hit_tokens: int = 0
    error: str | None = None
    class_name: str = ""
    output_ids: list[int] = field(default_factory=list)  # where they were asked for and the server gives them

    @property
    def is_ok(self) -> bool:
        return self.error is None and bool(self.chunk_times)

    @property
    def ttft_s(self) -> float:
        return self.chunk_times[0] - self.sent_at

    @property
    def e2e_s(self) -> float:
        return self.chunk_times[-1] - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        if self.num_output_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        gaps = [after - before for before, after in zip(self.chunk_times, self.chunk_times[1:], strict=False)]
        num_zeros = max(0, self.num_output_tokens - 1 - len(gaps))
        return gaps + [0.0] * num_zeros

    def meets(self, slo_ttft_s: float, slo_tpot_s: float) -> bool:
        return self.is_ok and self.ttft_s <= slo_ttft_s and (self.tpot_s or 0.0) <= slo_tpot_s


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks; `ordered` is ascending and not empty."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values_s: Sequence[float]) -> Distribution | None:
        if not values_s:
            return None
        ordered = sorted(value * 1000 for value in values_s)
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
        return cls(sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    duration_s: float
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_hit_tokens: int
    num_output_tokens: int
    num_chunks: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None  # None: no limits given
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    errors: dict[str, int]


def by_class(measurements: Sequence[RequestMeasurement]) -> dict[str, list[RequestMeasurement]]:
    """In the order of names; empty when no request has a class."""
    found: dict[str, list[RequestMeasurement]] = {}
    for m in sorted(measurements, key=lambda m: m.class_name):
        if m.class_name:
            found.setdefault(m.class_name, []).append(m)
    return found


def summarize(
    measurements: Sequence[RequestMeasurement],
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    duration_s: float | None = None,
) -> Summary:
    """`measurements` of one run, not empty. `duration_s`: of the run they are a part of; when not given it
    lasts from the first request sent to the last token."""
    good = [m for m in measurements if m.is_ok]
    if duration_s is None:
        start = min(m.sent_at for m in measurements)
        end = max((m.chunk_times[-1] for m in measurements if m.chunk_times), default=start)
        duration_s = max(end - start, 1e-9)
    num_output = sum(m.num_output_tokens for m in good)
    num_prompt = sum(m.num_prompt_tokens for m in good)
    goodput = None
    if slo_ttft_ms is not None or slo_tpot_ms is not None:
        limits = [math.inf if limit is None else limit / 1000 for limit in (slo_ttft_ms, slo_tpot_ms)]
        goodput = sum(m.meets(*limits) for m in good) / duration_s
    errors: dict[str, int] = {}
    for m in measurements:
        if not m.is_ok:
            reason = m.error or "no token came"
            errors[reason] = errors.get(reason, 0) + 1
    return Summary(
        duration_s=duration_s,
        num_requests=len(measurements),
        num_failed=len(measurements) - len(good),
        num_prompt_tokens=num_prompt,
        num_hit_tokens=sum(m.num_hit_tokens for m in good),
        num_output_tokens=num_output,
        num_chunks=sum(len(m.chunk_times) for m in good),
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=num_output / duration_s,
        total_tokens_per_s=(num_output + num_prompt) / duration_s,
        goodput_per_s=goodput,
        ttft_ms=Distribution.of_seconds([m.ttft_s for m in good]),
        tpot_ms=Distribution.of_seconds([m.tpot_s for m in good if m.tpot_s is not None]),
        itl_ms=Distribution.of_seconds([gap for m in good for gap in m.itl_s]),
        e2e_ms=Distribution.of_seconds([m.e2e_s for m in good]),
        errors=errors,
    )
