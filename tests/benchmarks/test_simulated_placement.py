"""The policy on simulated traffic, the same every time: what single decisions do not show."""

from __future__ import annotations

import pytest

from benchmarks.simulated_placement import LOADS, Simulation, Traffic, summarize


def run(policy: str, num_decode: int, num_prefill: int, load: str, requests_per_s: float) -> dict[str, float]:
    traffic = Traffic(requests_per_s=requests_per_s, num_requests=400, **LOADS[load])
    finished = Simulation(policy, num_decode, num_prefill, traffic).run()
    assert len(finished) == 400
    return summarize(finished)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("requests_per_s", [1.0, 2.0])
def test_disaggregation_is_hardly_worse_than_the_same_machines_without(
    load: str, requests_per_s: float
) -> None:
    with_it, without = run("prefix", 2, 2, load, requests_per_s), run("prefix", 4, 0, load, requests_per_s)
    assert with_it["E2E mean ms"] < 1.1 * without["E2E mean ms"]


def test_decode_workers_help_when_prefill_workers_cannot_keep_up() -> None:
    """640 tokens of 1.2 ms, 4 times a second, are three workers' work."""
    with_it, without = run("prefix", 2, 2, "no sharing", 4.0), run("prefix", 4, 0, "no sharing", 4.0)
    assert with_it["prefilled by decode"] > 0.2
    assert with_it["E2E mean ms"] < 1.1 * without["E2E mean ms"]
    assert run("round_robin", 2, 2, "no sharing", 4.0)["E2E mean ms"] > 3 * with_it["E2E mean ms"]


@pytest.mark.parametrize("simple", ["round_robin", "least_loaded"])
def test_without_shared_prefixes_it_is_no_worse_than_a_simple_policy(simple: str) -> None:
    for load in ("no sharing", "long answers"):
        with_costs, without = run("prefix", 2, 2, load, 1.0), run(simple, 2, 2, load, 1.0)
        assert with_costs["TTFT p50 ms"] < 1.05 * without["TTFT p50 ms"]
        assert with_costs["E2E mean ms"] < 1.05 * without["E2E mean ms"]


def test_shared_prefixes_pay() -> None:
    with_costs, without = (
        run("prefix", 2, 2, "shared prefix", 2.0),
        run("round_robin", 2, 2, "shared prefix", 2.0),
    )
    assert 3 * with_costs["TTFT p50 ms"] < without["TTFT p50 ms"]
