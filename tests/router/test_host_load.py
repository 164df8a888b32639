from __future__ import annotations

from typing import Any

import pytest

from router.host_load import with_neighbours
from router.policy import Chance, PolicyConfig, choose
from router.route_cost import Candidate, RouteRequest
from router.worker_rates import WorkerRates

RATES = WorkerRates(step_s=0.01, prefill_token_s=0.001, decode_seq_s=0.001)


def worker(worker_id: str, **fields: Any) -> Candidate:
    shared = {"layout_fingerprint": "a", "host_id": "h", "cpu_share": 0.5, "rates": RATES}
    return Candidate(worker_id=worker_id, **{**shared, **fields})


def busy(worker_id: str, num_requests: int = 1, **fields: Any) -> Candidate:
    fields = {"num_requests": num_requests, "num_waiting_tokens": 800 * num_requests, **fields}
    return worker(worker_id, **fields)


def test_as_long_as_there_are_processors_nobody_is_in_the_way() -> None:
    workers = [worker("d0"), busy("p0"), worker("p1")]
    assert with_neighbours(workers) == workers


def test_one_more_than_there_are_processors_for_slows_itself_and_the_others() -> None:
    idle, *others = with_neighbours([worker("d0"), busy("p0", 2), busy("p1", 3)])
    assert idle.slowdown == pytest.approx(1.5)
    assert idle.num_slowed == pytest.approx(0.5 * 5)
    assert [(each.slowdown, each.num_slowed) for each in others] == [(1.0, 0.0), (1.0, 0.0)]


def test_who_is_busy_already_takes_nothing_more_from_the_others() -> None:
    for each in with_neighbours([busy("p0"), busy("p1"), busy("p2"), busy("p3")]):
        assert each.slowdown == pytest.approx(2.0)
        assert each.num_slowed == 0.0


def test_requests_whose_prompts_are_computed_elsewhere_compute_nothing() -> None:
    waiting = worker("d0", num_requests=4, num_handing_off=4)
    workers = [waiting, busy("p0"), worker("p1")]
    assert with_neighbours(workers) == workers


@pytest.mark.parametrize("fields", [{"cpu_share": 0.0}, {"host_id": "other"}, {"host_id": ""}])
def test_devices_and_other_hosts_are_not_in_the_way(fields: dict[str, Any]) -> None:
    apart = worker("d0", **fields)
    assert with_neighbours([apart, busy("p0"), busy("p1")])[0] == apart


def decide(decode: list[Candidate], prefill: list[Candidate]) -> str | None:
    workers = with_neighbours([*decode, *prefill])
    request = RouteRequest(num_prompt_tokens=800, max_tokens=2)
    config, chance = PolicyConfig(name="prefix"), Chance(turn=0)
    return choose(config, request, workers[: len(decode)], workers[len(decode) :], chance).prefill_id


def test_a_prompt_queues_where_computing_it_at_once_would_only_share_the_processors() -> None:
    assert decide([worker("d0")], [busy("p0"), busy("p1", 2)]) == "p0"
    own = {"cpu_share": 0.0}
    assert decide([worker("d0", **own)], [busy("p0", **own), busy("p1", 2, **own)]) is None
