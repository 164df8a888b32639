"""benchmarks.gpu_serve: what it counts, and that all of it runs, in small and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.bench.measurement import RequestMeasurement
from benchmarks.gpu_loads import (
    SLO_TPOT_S,
    SLO_TTFT_S,
    added_rows,
    isolation_row,
    longest_gaps_s,
    sweep_row,
)
from benchmarks.gpu_serve import COLUMNS, main
from benchmarks.gpu_topologies import CARRIERS, TINY, TOPOLOGIES, Scale, topology, write_model
from router.tokenizer import Tokenizer


def answer(
    ttft_s: float, gaps_s: list[float], class_name: str = "chat", error: str | None = None
) -> RequestMeasurement:
    times = [10.0 + ttft_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return RequestMeasurement(
        sent_at=10.0,
        chunk_times=times,
        num_prompt_tokens=100,
        num_output_tokens=len(times),
        class_name=class_name,
        error=error,
    )


def test_good_is_by_when_a_request_was_sent_and_needs_both_limits() -> None:
    measured = [
        answer(0.9 * SLO_TTFT_S, [0.9 * SLO_TPOT_S] * 10),
        answer(1.1 * SLO_TTFT_S, [0.9 * SLO_TPOT_S] * 10),
        answer(0.9 * SLO_TTFT_S, [1.1 * SLO_TPOT_S] * 10, "long"),
        answer(0.1, [0.001], error="HTTP 503"),
    ]
    row = sweep_row(2.0, measured)  # four requests at two a second: two seconds of arrivals
    assert (row["good/s"], row["good share"], row["failed"]) == (0.5, 0.25, 1)
    assert row["long TTFT p50/p99 ms"] == "900.0 / 900.0"


def test_the_longest_gap_is_one_a_request() -> None:
    assert longest_gaps_s([answer(0.1, [0.01, 0.05]), answer(0.1, [0.02]), answer(0.1, [])]) == pytest.approx(
        [0.05, 0.02]
    )
    row = isolation_row(4, [answer(0.1, [0.01, 0.05])], num_long=3)
    assert (row["TPOT p50 ms"], row["longest gap p99 ms"]) == (pytest.approx(30), pytest.approx(50))


def test_a_topology_says_where_workers_are_and_who_computes_prompts() -> None:
    plans = {name: topology(name, Path("/m"), Scale()) for name in TOPOLOGIES}
    assert "--aggregated" in plans["both"].options
    assert [name for name, plan in plans.items() if "--gpus" in plan.options] == ["two", "two-handoff"]
    assert [
        name for name, plan in plans.items() if plan.environment.get("BATON_ROUTER_POLICY") == "round_robin"
    ] == ["shared", "two-handoff"]
    shared = plans["shared"].environment
    assert int(shared["BATON_DECODE_TOKEN_BUDGET"]) >= int(shared["BATON_DECODE_MAX_RUNNING"]) + 16
    by_carrier = {c: topology("shared", Path("/m"), Scale(), carrier=c).environment for c in CARRIERS}
    assert by_carrier["ipc"] == shared
    assert by_carrier["pinned"]["BATON_DECODE_DEVICE_MEMORY"] == "false"
    assert by_carrier["grpc"]["BATON_DECODE_SHARED_MEMORY"] == "false"


def test_what_a_hand_off_adds_is_beside_the_same_prompts_without_one() -> None:
    def found(carrier: str | None, ttft_ms: float, handoff_ms: float | None) -> dict[str, object]:
        return {"handoff": [{"carrier": carrier, "TTFT ms": ttft_ms, "hand-off ms": handoff_ms}]}

    with_one = {"shared-ipc": found("device_memory", 60.0, 1.0), "two": {"error": "lost"}}
    rows = added_rows({"both": found(None, 50.0, None), **with_one})
    assert [(row["carrier"], row["without ms"], row["share of TTFT without"]) for row in rows] == [
        ("device_memory", 50.0, 0.02)
    ]
    assert [row["share of TTFT without"] for row in added_rows(with_one)] == [None]
    assert added_rows({"both": {"error": "lost"}}) == []


def test_every_token_id_of_the_model_has_a_text(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", TINY)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    assert tokenizer.vocab_size == TINY.vocab_size
    assert all(tokenizer.token_bytes(token_id) for token_id in range(3, TINY.vocab_size))


def test_all_parts_run_on_a_stack_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    arguments = ["run", "--tiny", "--topologies", "shared", "--rows", "1", "--rates", "4", "--seconds", "1"]
    exit_code = main([*arguments, "--json", str(path)])
    assert exit_code == 0, capsys.readouterr().out
    found = json.loads(path.read_text())["topologies"]["shared"]
    for part, columns in COLUMNS.items():
        assert found[part], part
        assert all(set(row) == set(columns) for row in found[part])
    assert found["sweep"][0]["failed"] == 0
    assert found["isolation"][1]["long prompts"] >= 1
    assert found["handoff"][0]["MB"] > 0
    assert found["handoff"][0]["carrier"] == "shared_memory"
    assert {row["process"] for row in found["start"]} == {"prefill-0", "decode-0"}


def test_a_topology_that_fails_is_told_with_its_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--tiny", "--topologies", "both", "--token-budget", "1"]  # no step fits in that
    assert main([*arguments, "--log-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "both FAILED" in shown
    assert "token_budget must be at least" in shown
