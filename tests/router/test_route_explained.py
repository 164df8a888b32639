"""Why a request went where it went: the header, the log and the metrics; and that routers agree."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvstore.block_hash import BlockTier, HashChain
from kvstore.worker_record import WorkerLoad
from proto import common_pb2
from tests.fakes.fake_decode_worker import decode_record
from tests.router.conftest import Router, RouterFactory

CHAIN = HashChain(model_fingerprint="weights", block_size=4)
LONG = [5 + index % 40 for index in range(200)]
NAMES = (
    "decode prefill predicted_hit_tokens reason cost_s wait_s load_s compute_s handoff_s decode_s disturb_s"
).split()
SLOW, FAST = WorkerLoad(prefill_tokens_per_s=1.0), WorkerLoad(prefill_tokens_per_s=1000.0)


def parsed(headers: Any) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in headers["x-baton-route"].split("; "))


async def add_prefill(router: Router, worker_id: str, **fields: Any) -> None:
    await router.announce(decode_record(worker_id, "127.0.0.1:1", role="prefill", **fields))
    await router.until(lambda: worker_id in {record.worker_id for record in router.fleet.prefill_workers()})


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
async def test_every_answer_says_why_it_came_from_there(router: Router, endpoint: str, streams: bool) -> None:
    response = await getattr(router, endpoint)(stream=streams)
    assert response.status_code == 200
    route = parsed(response.headers)
    assert list(route) == NAMES
    assert (route["decode"], route["prefill"]) == ("decode-0", "local")
    assert route["reason"] == "least_cost,no_prefill_worker"
    terms = [float(route[name]) for name in NAMES[5:]]
    assert float(route["cost_s"]) == pytest.approx(sum(terms), abs=0.001)
    assert "127.0.0.1" not in response.headers["x-baton-route"]


async def test_the_first_route_is_shown_after_a_migration(make_router: RouterFactory) -> None:
    router = await make_router()
    for worker_id in ("decode-0", "decode-1"):
        await router.add_worker(worker_id)
    router.index.publish("decode-0", CHAIN.hashes(LONG))
    lost = common_pb2.Error(kind=common_pb2.ERROR_KIND_WORKER_LOST, message="draining")
    router.workers["decode-0"].errors = [lost]
    response = await router.complete(prompt=LONG)
    assert len(router.workers["decode-1"].submits) == 1
    assert parsed(response.headers)["decode"] == "decode-0"


async def test_the_log_has_all_that_was_considered(
    make_router: RouterFactory, caplog: pytest.LogCaptureFixture
) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    await add_prefill(router, "prefill-0")
    await router.complete(prompt=LONG)
    assert [record for record in caplog.records if record.msg == "route_considered"] == []
    with caplog.at_level(logging.DEBUG, logger="router.route_planner"):
        response = await router.complete(prompt=LONG)
    [record] = [record for record in caplog.records if record.msg == "route_considered"]
    options = record.fields["options"]
    assert {(option["decode"], option["prefill"]) for option in options} == {
        ("decode-0", "local"),
        ("decode-0", "prefill-0"),
    }
    chosen = min(options, key=lambda option: option["cost_s"])
    assert float(parsed(response.headers)["cost_s"]) == pytest.approx(chosen["cost_s"], rel=0.001)
    assert str(LONG[:5])[1:-1] not in str(record.fields)


async def test_whoever_prefills_may_fetch_from_a_worker_that_holds_more(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0", load=SLOW)
    await add_prefill(router, "prefill-0", load=FAST)
    router.index.publish("decode-0", CHAIN.hashes(LONG)[:40])
    router.index.publish("prefill-0", CHAIN.hashes(LONG)[:2])
    response = await router.complete(prompt=LONG)
    route = parsed(response.headers)
    assert (route["prefill"], route["peer"]) == ("prefill-0", "decode-0")
    peer = router.workers["decode-0"].submits[0].peer
    [address] = [r.address for r in await router.registry.list() if r.worker_id == "decode-0"]
    assert (peer.worker_id, peer.address, peer.num_blocks) == ("decode-0", address, 40)
    assert await router.metric("baton_router_peer_offers_total") == 1


async def test_a_decode_worker_may_fetch_from_a_busy_prefill_worker(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    await add_prefill(router, "prefill-0", load=WorkerLoad(num_waiting_tokens=100_000))
    router.index.publish("prefill-0", CHAIN.hashes(LONG))
    route = parsed((await router.complete(prompt=LONG)).headers)
    assert (route["prefill"], route["peer"], route["reason"]) == ("local", "prefill-0", "least_cost,local")
    assert router.workers["decode-0"].submits[0].peer.num_blocks == 50


async def test_nobody_is_offered_who_holds_no_more(make_router: RouterFactory) -> None:
    router = await make_router()
    for worker_id in ("decode-0", "decode-1"):
        await router.add_worker(worker_id)
        router.index.publish(worker_id, CHAIN.hashes(LONG)[:9])
    assert "peer" not in parsed((await router.complete(prompt=LONG)).headers)
    assert not any(s.HasField("peer") for worker in router.workers.values() for s in worker.submits)


async def test_a_prefix_on_disk_counts_for_less(make_router: RouterFactory) -> None:
    router = await make_router()
    for worker_id in ("decode-0", "decode-1"):
        await router.add_worker(worker_id)
    router.index.publish("decode-0", CHAIN.hashes(LONG), BlockTier.DISK)
    route = parsed((await router.complete(prompt=LONG)).headers)
    assert route["decode"] == "decode-0"
    assert float(route["load_s"]) > 0
    router.index.publish("decode-1", CHAIN.hashes(LONG))
    assert parsed((await router.complete(prompt=LONG)).headers)["decode"] == "decode-1"


async def test_a_suspected_prefill_worker_is_as_good_as_none(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    await add_prefill(router, "prefill-0")
    router.fleet.suspect("prefill-0")
    route = parsed((await router.complete(prompt=LONG)).headers)
    assert route["reason"] == "least_cost,no_prefill_worker"


async def test_guesses_are_measured_against_what_came(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0", num_hit_tokens=8)
    router.index.publish("decode-0", CHAIN.hashes(LONG[:12]))
    await router.complete(prompt=LONG)
    assert await router.metric("baton_router_hit_error_tokens_sum") == 4
    assert await router.metric("baton_router_hit_error_tokens_count") == 1
    predicted_s = await router.metric("baton_router_predicted_ttft_seconds_sum")
    error_s = await router.metric("baton_router_ttft_error_seconds_sum")
    assert predicted_s == pytest.approx(0.01 + 188 * 0.001)  # with assumed rates
    assert 0 < error_s < predicted_s + 30


async def test_a_temperature_draws(make_router: RouterFactory) -> None:
    router = await make_router(policy_temperature_s=1000.0)
    for worker_id in ("decode-0", "decode-1"):
        await router.add_worker(worker_id)
    router.index.publish("decode-0", CHAIN.hashes(LONG))
    routes = [parsed((await router.complete(prompt=LONG, max_tokens=1)).headers) for _ in range(40)]
    assert {route["reason"] for route in routes} == {"drawn,no_prefill_worker"}
    assert {route["decode"] for route in routes} == {"decode-0", "decode-1"}  # all but 1 in 10^12 times


async def test_routers_that_know_the_same_route_alike_and_so_does_one_that_was_restarted(
    make_router: RouterFactory,
) -> None:
    first = await make_router()
    for index in range(3):
        await first.add_worker(f"decode-{index}")
        await add_prefill(first, f"prefill-{index}", load=FAST)
    prompts = [[7 + index, *LONG] for index in range(6)]
    for index, prompt in enumerate(prompts):
        hashes = CHAIN.hashes(prompt)
        first.index.publish(f"prefill-{index % 3}", hashes[: 10 + index])
        first.index.publish(f"decode-{(index + 1) % 3}", hashes[: 5 * index])

    async def routes(router: Router) -> list[str]:
        await router.until(lambda: len(router.linked()) == 3 and len(router.fleet.prefill_workers()) == 3)
        answers = [await router.complete(prompt=prompt) for prompt in prompts]
        return [answer.headers["x-baton-route"] for answer in answers]

    expected = await routes(first)
    assert len({route.split("; predicted")[0] for route in expected}) > 3
    assert await routes(await make_router(like=first)) == expected
    assert await routes(await make_router(like=first)) == expected  # as a new process would
