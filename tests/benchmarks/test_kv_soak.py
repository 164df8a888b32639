"""The simulated day of benchmarks.kv_soak, compressed; and that its checks can fail."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.kv_soak import Simulation, Soak, check_index, grown, verify
from benchmarks.simulated_fleet import Fleet, Prompt, Request, check_blocks
from kvstore import keys
from kvstore.memory_index import MemoryIndex
from kvstore.store import Store
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.redis_server import redis_server

PROMPT = Prompt(token_ids=list(range(10, 30)), max_tokens=6)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as (_, address):
        yield address


def soak(**changes: float) -> Soak:
    fast = {"hours": 0.3, "num_workers": 3, "check_every_s": 60, "restart_every_s": 80, "verified": 0.05}
    return Soak(**(fast | changes))


async def test_a_quarter_of_an_hour_of_traffic_leaks_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_STREAM_EVENTS", 200)  # as full as it gets after hours
    simulation = Simulation(url, soak())
    await simulation.run()
    assert len(simulation.samples) == 18
    assert simulation.traffic.num_sent > 300
    assert simulation.num_verified > 10
    assert min(simulation.num_restarts, simulation.traffic.num_cancelled, simulation.fleet.num_handoffs) > 10
    assert sum(s.hit_rate for s in simulation.samples) / 18 > 0.15
    assert grown([s.redis_bytes for s in simulation.samples]) < 1.3
    assert max(s.num_mirror_blocks for s in simulation.samples) <= 3 * 192
    assert max(s.num_redis_keys for s in simulation.samples) <= 2 + 3 * (3 + simulation.num_restarts)
    for worker in simulation.fleet.workers.values():
        assert worker.engine.load().num_used_blocks == 0


async def test_the_same_seed_sends_the_same_requests(url: str) -> None:
    sent = []
    for _ in range(2):
        simulation = Simulation(url, soak(hours=0.02, check_every_s=30, restart_every_s=1000))
        await simulation.run()
        sent.append((simulation.traffic.num_sent, simulation.traffic.num_cancelled))
    assert sent[0] == sent[1]


@pytest.fixture
async def fleet(url: str) -> Iterator[Fleet]:
    store = Store(url)
    fleet = Fleet(store, "pair", 2, build_fake_engine)
    yield fleet
    await fleet.stop()
    await store.close()


def run_one(fleet: Fleet, prefill_id: str | None) -> Request:
    done: list[Request] = []
    fleet.submit(PROMPT, "worker-0", prefill_id, done.append)
    while not done:
        fleet.step()
    return done[0]


async def test_an_answer_is_the_same_with_and_without_a_hand_off(fleet: Fleet) -> None:
    local = run_one(fleet, None)
    handed_off = run_one(fleet, "worker-1")
    assert local.output_ids == handed_off.output_ids == expected_tokens(PROMPT.token_ids, 6)
    assert verify([local, handed_off], random.Random(0), share=1.0) == 2
    check_blocks(fleet)


@pytest.mark.parametrize("num_steps", range(4))
async def test_a_request_cancelled_at_any_moment_leaves_nothing(fleet: Fleet, num_steps: int) -> None:
    fleet.submit(PROMPT, "worker-0", "worker-1", lambda _: None)
    for _ in range(num_steps):
        fleet.step()
    [request] = fleet.requests()
    fleet.cancel(request)
    assert fleet.requests() == []
    check_blocks(fleet)


@pytest.mark.parametrize("crashes", [True, False])
@pytest.mark.parametrize("worker_id", ["worker-0", "worker-1"])
async def test_a_restarted_worker_takes_its_requests_from_both_sides(
    fleet: Fleet, worker_id: str, crashes: bool
) -> None:
    fleet.submit(PROMPT, "worker-0", "worker-1", lambda _: None)
    await fleet.restart(worker_id, crashes=crashes)
    assert fleet.requests() == []
    check_blocks(fleet)
    assert run_one(fleet, "worker-1").output_ids == expected_tokens(PROMPT.token_ids, 6)


async def test_a_wrong_answer_is_noticed(fleet: Fleet) -> None:
    request = run_one(fleet, None)
    request.output_ids[-1] ^= 1
    with pytest.raises(AssertionError, match="wrong block"):
        verify([request], random.Random(0), share=1.0)


async def test_a_mirror_that_shows_too_much_or_too_little_is_noticed(fleet: Fleet) -> None:
    run_one(fleet, None)
    held = fleet.workers["worker-0"].engine.cached_hashes()
    index = MemoryIndex()
    with pytest.raises(AssertionError, match="too few"):
        check_index(fleet, index)
    index.publish("worker-0", held)
    check_index(fleet, index)
    index.publish("worker-1", held)
    with pytest.raises(AssertionError, match="too many"):
        check_index(fleet, index)
    index.drop("worker-1")
    index.publish("worker-9", held)
    with pytest.raises(AssertionError, match="worker-9"):
        check_index(fleet, index)


async def test_blocks_that_are_lost_are_noticed(fleet: Fleet) -> None:
    fleet.submit(PROMPT, "worker-0", None, lambda _: None)
    fleet.step()
    fleet.workers["worker-0"].requests.clear()
    with pytest.raises(AssertionError, match="nobody"):
        check_blocks(fleet)


def test_growth_compares_the_end_with_the_time_after_the_start() -> None:
    assert grown([1, 5, 10, 10, 9, 10, 8, 10]) == pytest.approx(1.0)
    assert grown([1, 2, 10, 10, 11, 12, 13, 14]) == pytest.approx(1.4)
