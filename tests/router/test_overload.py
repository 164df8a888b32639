"""What would wait too long is refused at once; the prediction is arithmetic on what the fleet says."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvstore.worker_record import WorkerLoad
from router import policy
from router.link import Link
from router.overload import OverloadGuard, Patience
from router.route_cost import Candidate, RouteRequest
from router.route_planner import Route
from router.service_times import ServiceTimes
from router.worker_rates import WorkerRates
from servicekit.errors import Overloaded
from tests.fakes.fake_decode_worker import decode_record
from tests.router.conftest import Router, RouterFactory


def route(
    *, places: int = 0, ahead: int = 0, tokens_ahead: int = 0, tokens_per_s: float = 0.0, computed: int = 10
) -> Route:
    record = decode_record("decode-0", "127.0.0.1:1", max_running=places)
    is_measured = tokens_per_s > 0
    worker = Candidate(
        worker_id="decode-0",
        layout_fingerprint=record.layout_fingerprint,
        num_requests=ahead,
        num_waiting_tokens=tokens_ahead,
        rates=WorkerRates(
            step_s=0.0,
            prefill_token_s=1 / tokens_per_s if is_measured else 1.0,
            decode_seq_s=0.0,
            is_measured=is_measured,
        ),
    )
    asked = RouteRequest(num_prompt_tokens=computed, max_tokens=100)
    config = policy.PolicyConfig(name="prefix")
    return Route(
        decision=policy.choose(config, asked, [worker], [], policy.Chance(turn=0)),
        link=Link(record, lambda: None),
        decode=record,
        prefill=None,
        peer=None,
        num_requests_ahead=ahead,
        _prefill_load=None,
    )


def guard(max_queue_wait_s: float = 10.0, *, residence_s: float = 4.0, num_tokens: int = 41) -> OverloadGuard:
    result = OverloadGuard(max_queue_wait_s)
    result.times.ended(residence_s, residence_s, num_tokens)
    return result


PATIENT = Patience(time_left_s=None, max_tokens=100)


@pytest.mark.parametrize(
    ("facts", "wait_s"),
    [
        ({"places": 8, "ahead": 7}, 0.0),  # the last place is free
        ({"places": 8, "ahead": 8}, 0.5),  # one of eight leaves in 4 s / 8
        ({"places": 8, "ahead": 31}, 12.0),
        ({"tokens_ahead": 600, "tokens_per_s": 200.0}, 3.0),
        ({"tokens_ahead": 600, "tokens_per_s": 200.0, "places": 8, "ahead": 31}, 12.0),
        ({"tokens_ahead": 600, "ahead": 1000}, 0.0),  # nothing is measured or told yet
    ],
)
def test_the_wait_is_what_is_ahead_over_its_rate(facts: dict[str, float], wait_s: float) -> None:
    assert guard().predicted_wait_s(route(**facts)) == pytest.approx(wait_s)  # type: ignore[arg-type]


def test_beyond_the_longest_wait_it_is_refused_with_the_time_until_it_would_not_be() -> None:
    busy = route(places=8, ahead=31)  # 12 s
    assert guard(12.5).admitted(busy, PATIENT, lambda _: None) is busy
    with pytest.raises(Overloaded) as caught:
        guard(10.0).admitted(busy, PATIENT, lambda _: None)
    assert caught.value.retry_after_s == pytest.approx(2.0)


def test_what_cannot_end_before_its_deadline_is_refused() -> None:
    """12 s in the queue, 10 tokens at 20/s, and 41 tokens of 0.1 s."""
    busy = route(places=8, ahead=31, tokens_per_s=20.0)
    service_s = 0.5 + 4.1
    just_enough = Patience(time_left_s=12.0 + service_s + 0.01, max_tokens=100)
    assert guard(0.0).admitted(busy, just_enough, lambda _: None) is busy
    with pytest.raises(Overloaded):
        guard(0.0).admitted(busy, replace(just_enough, time_left_s=12.0 + service_s - 0.01), lambda _: None)


def test_a_short_answer_needs_less_time() -> None:
    one_token = Patience(time_left_s=1.0, max_tokens=1)
    assert guard().admitted(route(places=8), one_token, lambda _: None)
    with pytest.raises(Overloaded):
        guard().admitted(route(places=8), replace(one_token, max_tokens=1000), lambda _: None)


def test_the_least_important_are_refused_first() -> None:
    """Waits of 4, 8 and 12 s where 10 s are allowed."""
    admitted = {
        name: [
            ahead
            for ahead in (15, 23, 31, 39)
            if not _is_refused(
                route(places=8, ahead=ahead), Patience(time_left_s=None, max_tokens=1, priority=priority)
            )
        ]
        for name, priority in (("low", 100), ("normal", 0), ("high", -1))
    }
    assert admitted == {"low": [15], "normal": [15, 23], "high": [15, 23, 31]}


def _is_refused(route: Route, patience: Patience) -> bool:
    try:
        guard().admitted(route, patience, lambda _: None)
    except Overloaded:
        return True
    return False


def test_other_workers_are_tried_before_it_is_refused() -> None:
    busy, busier, free = route(places=8, ahead=31), route(places=8, ahead=99), route(places=8)
    others = [busier, free]
    tried: list[int] = []

    def replan(excluded: set[Link]) -> Route | None:
        tried.append(len(excluded))
        return others.pop(0) if others else None

    assert guard().admitted(busy, PATIENT, replan) is free
    assert tried == [1, 2]


def test_means_follow_what_ended_lately() -> None:
    times = ServiceTimes()
    for _ in range(100):
        times.ended(1.0, 0.9, 10)
    assert (times.residence_s, times.tpot_s) == (pytest.approx(1.0), pytest.approx(0.1))
    for _ in range(100):
        times.ended(3.0, 2.7, 10)
    assert 2.9 < times.residence_s <= 3.0


async def test_a_full_batch_with_a_queue_refuses_before_the_worker_hears_of_it(
    make_router: RouterFactory,
) -> None:
    router: Router = await make_router(max_queue_wait_s=1.0)
    worker = await router.add_worker("decode-0", is_held=True)
    record = decode_record("decode-0", f"127.0.0.1:{worker.port}", max_running=2)
    await router.announce(record)
    await router.until(lambda: router.fleet.workers()[0][0].max_running == 2)
    router.app.state.serving.models.first.overload.times.ended(1.5, 1.5, 10)
    accepted = [asyncio.create_task(router.complete()) for _ in range(3)]  # two run, one waits 0.75 s
    await worker.until(lambda: len(worker.submits) == 3)
    refused = await router.complete()
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert len(worker.submits) == 3
    await worker.release()
    assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200] * 3
    assert await router.metric('baton_router_refused_total{reason="capacity"}') == 1
    assert (await router.complete()).status_code == 200


async def test_queued_prompt_tokens_count_with_what_was_just_sent(make_router: RouterFactory) -> None:
    """At 10 tokens a second a prompt of 20 leaves no room for another within 1 s; the worker told nothing."""
    router: Router = await make_router(max_queue_wait_s=1.0)
    worker = await router.add_worker("decode-0", is_held=True)
    record = decode_record("decode-0", f"127.0.0.1:{worker.port}", load=WorkerLoad(prefill_tokens_per_s=10.0))
    await router.announce(record)
    await router.until(lambda: router.fleet.workers()[0][0].load.prefill_tokens_per_s == 10.0)
    first = asyncio.create_task(router.complete(prompt=[5] * 20))
    await worker.until(lambda: len(worker.submits) == 1)
    assert (await router.complete(prompt=[5] * 20)).status_code == 503
    await worker.release()
    assert (await first).status_code == 200
    assert (await router.complete(prompt=[5] * 20)).status_code == 200
