"""What the longest gaps between two tokens were spent on: those that clients measured beside the steps that
the decode worker logged at level DEBUG. All processes are on one machine, so they share a clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from baton.bench.measurement import RequestMeasurement, percentile

CAUSE_COLUMNS = (
    "gap",
    "requests",
    "ms p50/p99",
    "steps",
    "longest step ms",
    "its prompt tokens",
    "outside ms",
)
LONGEST_COLUMNS = ("ms", "after token", "steps: ms, decodes + prompt tokens", "outside ms")
PAUSE_COLUMNS = ("process", "ms", "of them computing", "where")
STEP_COLUMNS = ("decodes", "steps", "median ms")
_DECODES_APART = 16  # about the sizes of the graphs
_SHARE = 0.05  # of the requests, those with the longest gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """Seconds of the monotonic clock."""

    ended_at: float
    delivered_at: float
    step_s: float
    num_decodes: int
    num_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest of one request, and the steps whose tokens left the worker in it."""

    after_token: int  # 1: between the first token and the second
    seconds: float
    steps: Sequence[LoggedStep]

    @property
    def longest(self) -> LoggedStep | None:
        return max(self.steps, key=lambda step: step.step_s, default=None)

    @property
    def outside_s(self) -> float:
        """Not in any step: the way to the client, or a device that had nothing to do."""
        return self.seconds - sum(step.step_s for step in self.steps)


def logged_steps(events: Iterable[Mapping[str, Any]]) -> list[LoggedStep]:
    """In the order in which their tokens left."""
    steps = [
        LoggedStep(
            ended_at=event["ended_at"],
            delivered_at=event["ended_at"] + event["delivered_s"],
            step_s=event["step_s"],
            num_decodes=event["num_decodes"],
            num_prefill_tokens=event["num_prefill_tokens"],
        )
        for event in events
        if event.get("event") == "step"
    ]
    return sorted(steps, key=lambda step: step.delivered_at)


def longest_gaps(measured: Sequence[RequestMeasurement], steps: Sequence[LoggedStep]) -> list[Gap]:
    """One a request of two chunks or more, the longest first."""
    delivered = [step.delivered_at for step in steps]
    gaps = []
    for m in measured:
        times = m.chunk_times
        if not m.is_ok or len(times) < 2:
            continue
        place = max(range(1, len(times)), key=lambda i: times[i] - times[i - 1])
        first, end = (bisect_right(delivered, times[i]) for i in (place - 1, place))
        gaps.append(Gap(place, times[place] - times[place - 1], steps[first:end]))
    return sorted(gaps, key=lambda gap: -gap.seconds)


def cause_rows(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """Of all requests, and of those with the longest gaps, by what the gap was."""
    worst = gaps[: max(1, round(_SHARE * len(gaps)))] if gaps else []
    rows = [_row("all", gaps)] if gaps else []
    for title, is_kind in _KINDS.items():
        for name, some in (("", gaps), (f", longest {_SHARE:.0%}", worst)):
            if found := [gap for gap in some if is_kind(gap)]:
                rows.append(_row(title + name, found))
    return rows


def longest_rows(gaps: Sequence[Gap], num_rows: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "ms": _ms(gap.seconds),
            "after token": gap.after_token,
            "steps: ms, decodes + prompt tokens": "; ".join(
                f"{_ms(step.step_s)}, {step.num_decodes} + {step.num_prefill_tokens}" for step in gap.steps
            ),
            "outside ms": _ms(gap.outside_s),
        }
        for gap in gaps[:num_rows]
    ]


def pause_rows(
    events: Iterable[tuple[str, Mapping[str, Any]]], since: float, num_rows: int = 12
) -> list[dict[str, Any]]:
    """The longest that ended then or later. events: (process, event)"""
    pauses = []
    for process, event in events:
        if event.get("ended_at", 0.0) < since:
            continue
        if event.get("event") == "garbage_search":
            where = f"search for garbage, generation {event['generation']}"
            pauses.append((event["elapsed_s"], event["elapsed_s"], process, where))
        elif event.get("event") == "loop_held":
            pauses.append((event["held_s"], event["computing_s"], process, event["where"] or "not seen"))
    return [
        {"process": process, "ms": _ms(seconds), "of them computing": _ms(busy_s), "where": where}
        for seconds, busy_s, process, where in sorted(pauses, reverse=True)[:num_rows]
    ]


def step_rows(steps: Iterable[LoggedStep]) -> list[dict[str, Any]]:
    """Of those without prompts: 1 to 16 decodes, 17 to 32, and so on."""
    times: dict[int, list[float]] = {}
    for step in steps:
        if step.num_decodes and not step.num_prefill_tokens:
            times.setdefault((step.num_decodes - 1) // _DECODES_APART, []).append(step.step_s)
    return [
        {
            "decodes": f"{_DECODES_APART * size + 1} to {_DECODES_APART * (size + 1)}",
            "steps": len(found),
            "median ms": round(1e3 * median(found), 2),
        }
        for size, found in sorted(times.items())
    ]


_KINDS = {
    "behind the first token": lambda gap: gap.after_token == 1,
    "later, no prompt beside": lambda gap: gap.after_token > 1 and not _has_prompt(gap),
    "later, prompt beside": lambda gap: gap.after_token > 1 and _has_prompt(gap),
}


def _has_prompt(gap: Gap) -> bool:
    return any(step.num_prefill_tokens for step in gap.steps)


def _row(title: str, gaps: Sequence[Gap]) -> dict[str, Any]:
    ordered = sorted(gap.seconds for gap in gaps)
    longest = [gap.longest for gap in gaps if gap.longest is not None]
    return {
        "gap": title,
        "requests": len(gaps),
        "ms p50/p99": f"{_ms(percentile(ordered, 50))} / {_ms(percentile(ordered, 99))}",
        "steps": round(sum(len(gap.steps) for gap in gaps) / len(gaps), 1),
        "longest step ms": _ms(median(step.step_s for step in longest)) if longest else None,
        "its prompt tokens": median(step.num_prefill_tokens for step in longest) if longest else None,
        "outside ms": _ms(median(gap.outside_s for gap in gaps)),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
