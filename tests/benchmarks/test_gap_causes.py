"""benchmarks.gap_causes: which steps lie in a gap, and how gaps are sorted."""

from __future__ import annotations

from typing import Any

import pytest

from baton.bench.measurement import RequestMeasurement
from benchmarks.gap_causes import (
    Gap,
    cause_rows,
    logged_steps,
    longest_gaps,
    longest_rows,
    pause_rows,
    step_rows,
)


def step(ended_at: float, step_s: float, num_decodes: int, num_prefill_tokens: int = 0) -> dict[str, Any]:
    return {
        "event": "step",
        "ended_at": ended_at,
        "step_s": step_s,
        "delivered_s": 0.001,
        "num_decodes": num_decodes,
        "num_prefill_tokens": num_prefill_tokens,
    }


def request(*chunk_times: float, error: str | None = None) -> RequestMeasurement:
    return RequestMeasurement(sent_at=9.0, chunk_times=list(chunk_times), error=error)


EVENTS = [
    {"event": "ready"},
    step(10.030, 0.020, 3, 512),
    step(10.010, 0.010, 3),
    step(10.040, 0.010, 4),
    step(10.070, 0.010, 4),
]


def gaps(*measured: RequestMeasurement) -> list[Gap]:
    return longest_gaps(measured, logged_steps(EVENTS))


def test_a_gap_has_the_steps_whose_tokens_left_in_it() -> None:
    [gap] = gaps(request(10.012, 10.042, 10.050))
    assert (gap.after_token, gap.seconds) == (1, pytest.approx(0.030))
    assert [s.num_decodes for s in gap.steps] == [3, 4]
    assert gap.longest is not None and gap.longest.num_prefill_tokens == 512
    assert gap.outside_s == pytest.approx(0.0)


def test_time_in_no_step_is_outside() -> None:
    [gap] = gaps(request(10.032, 10.042, 10.072))
    assert gap.after_token == 2
    assert gap.outside_s == pytest.approx(0.020)


def test_the_longest_come_first_and_who_has_no_gap_is_left_out() -> None:
    found = gaps(request(10.0), request(10.0, 10.1, error="HTTP 503"), request(10.0, 10.1), request(1.0, 2.0))
    assert [gap.seconds for gap in found] == [pytest.approx(1.0), pytest.approx(0.1)]


def test_gaps_are_told_by_their_kind() -> None:
    found = gaps(
        request(10.012, 10.042), request(10.0, 10.001, 10.032), request(10.0, 10.001, 10.012), request(1, 2)
    )
    rows = {row["gap"]: row for row in cause_rows(found)}
    assert {title: row["requests"] for title, row in rows.items()} == {
        "all": 4,
        "behind the first token": 2,
        "behind the first token, longest 5%": 1,
        "later, no prompt beside": 1,
        "later, prompt beside": 1,
    }
    assert rows["later, prompt beside"]["its prompt tokens"] == 512
    assert rows["behind the first token, longest 5%"]["longest step ms"] is None
    assert longest_rows(found, num_rows=2)[1] == {
        "ms": 31.0,
        "after token": 2,
        "steps: ms, decodes + prompt tokens": "10.0, 3 + 0; 20.0, 3 + 512",
        "outside ms": 1.0,
    }
    assert cause_rows([]) == []


def test_the_longest_pauses_are_told_with_who_paused() -> None:
    found = [
        ("router", {"event": "garbage_search", "generation": 2, "elapsed_s": 0.006}),
        ("decode-0", {"event": "step"}),
        ("router", {"event": "loop_held", "held_s": 0.012, "computing_s": 0.011, "where": "a.py:1 f"}),
        ("client", {"event": "loop_held", "held_s": 0.007, "computing_s": 0.0, "where": ""}),
    ]
    events = [(process, {**event, "ended_at": 5.0 + i}) for i, (process, event) in enumerate(found)]
    rows = [tuple(row.values()) for row in pause_rows(events, since=5.0)]
    assert rows == [
        ("router", 12.0, 11.0, "a.py:1 f"),
        ("client", 7.0, 0.0, "not seen"),
        ("router", 6.0, 6.0, "search for garbage, generation 2"),
    ]
    assert [row["process"] for row in pause_rows(events, since=5.5, num_rows=1)] == ["router"]
    assert [row["ms"] for row in pause_rows(events, since=7.5)] == [7.0]


def test_steps_of_decodes_are_told_by_their_number() -> None:
    events = [step(float(i), 0.010 + i / 1000, num_decodes) for i, num_decodes in enumerate((16, 1, 17, 8))]
    events += [step(9.0, 1.0, 0, 512), step(9.0, 1.0, 3, 512)]
    assert [tuple(row.values()) for row in step_rows(logged_steps(events))] == [
        ("1 to 16", 3, 11.0),
        ("17 to 32", 1, 12.0),
    ]
