"""What the runs of benchmarks.prefix_routing say: one row a load and policy, and the two goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.bench.measurement import RequestMeasurement, summarize

COLUMNS = (
    "load",
    "policy",
    "requests",
    "failed",
    "TTFT p50 ms",
    "TTFT p99 ms",
    "TTFT mean ms",
    "TPOT p50 ms",
    "E2E mean ms",
    "prefilled by decode",
    "hit tokens",
    "hit rate",
    "predicted hit",
    "all tok/s",
)
PREFIX = "prefix"
LOCAL = "prefilled by decode"  # a counter: requests
GOAL_LOADS = ("shared prefix", "no sharing")
GOAL_SHARED = 3.0  # times round_robin's TTFT p50 over prefix's, at 80 % shared
GOAL_UNSHARED = 1.05  # times prefix's TTFT p50 over that of the best simple policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load against one policy, once."""

    load: str
    policy: str
    repeat: int
    measurements: list[RequestMeasurement]
    counters: Mapping[str, float]  # of the router, grown during the run


def result_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Percentiles over the requests of all repeats, throughput as a mean of repeats."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.load, run.policy), []).append(run)
    return [_row(load, policy, group) for (load, policy), group in groups.items()]


def ttft_ms(runs: Sequence[Run], load: str) -> dict[str, list[float]]:
    """By policy, of all repeats."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.load == load:
            found.setdefault(run.policy, []).extend(m.ttft_s * 1000 for m in run.measurements if m.is_ok)
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence a goal whose load was measured."""
    p50 = {(row["load"], row["policy"]): row["TTFT p50 ms"] for row in rows}
    sentences = []
    shared = _ratio(p50.get(("shared prefix", "round_robin")), p50.get(("shared prefix", PREFIX)))
    if shared is not None:
        sentences.append(
            f"shared prefix: TTFT p50 of round_robin is {shared:.2f} times that of prefix "
            f"(goal: at least {GOAL_SHARED:g}): {_judge(shared >= GOAL_SHARED)}"
        )
    simple = [
        value
        for (load, policy), value in p50.items()
        if load == "no sharing" and policy != PREFIX and value is not None
    ]
    unshared = _ratio(p50.get(("no sharing", PREFIX)), min(simple, default=None))
    if unshared is not None:
        sentences.append(
            f"no sharing: TTFT p50 of prefix is {unshared:.3f} times that of the best simple policy "
            f"(goal: at most {GOAL_UNSHARED:g}): {_judge(unshared <= GOAL_UNSHARED)}"
        )
    return sentences


def _row(load: str, policy: str, runs: Sequence[Run]) -> dict[str, Any]:
    pooled = [m for run in runs for m in run.measurements]
    each = [summarize(run.measurements) for run in runs]
    total = summarize(pooled)
    predicted = sum(run.counters.get("baton_router_predicted_hit_tokens_total", 0.0) for run in runs)
    return {
        "load": load,
        "policy": policy,
        "requests": total.num_requests,
        "failed": total.num_failed,
        "TTFT p50 ms": total.ttft_ms and total.ttft_ms.p50,
        "TTFT p99 ms": total.ttft_ms and total.ttft_ms.p99,
        "TTFT mean ms": total.ttft_ms and total.ttft_ms.mean,
        "TPOT p50 ms": total.tpot_ms and total.tpot_ms.p50,
        "E2E mean ms": total.e2e_ms and total.e2e_ms.mean,
        LOCAL: sum(run.counters.get(LOCAL, 0.0) for run in runs) / len(pooled),
        "hit tokens": total.num_hit_tokens,
        "hit rate": total.num_hit_tokens / max(1, total.num_prompt_tokens),
        "predicted hit": predicted / max(1, total.num_prompt_tokens),
        "all tok/s": sum(s.total_tokens_per_s for s in each) / len(each),
        "TTFT p50 ms by repeat": [s.ttft_ms and s.ttft_ms.p50 for s in each],
        "TTFT ms": [round(m.ttft_s * 1000, 1) for m in pooled if m.is_ok],
        "router hit tokens": sum(run.counters.get("baton_router_hit_tokens_total", 0.0) for run in runs),
        "errors": total.errors,
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _judge(is_met: bool) -> str:
    return "met" if is_met else "NOT met"
