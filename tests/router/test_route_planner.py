"""Fleet, index and planner together, seen through the requests that workers get."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from kvstore.block_hash import HashChain
from kvstore.worker_record import WorkerLoad
from tests.fakes.fake_decode_worker import decode_record
from tests.router.conftest import Router, RouterFactory

CHAIN = HashChain(model_fingerprint="weights", block_size=4)
LONG = [5 + index % 40 for index in range(200)]
# An idle decode worker that is as fast as a prefill worker prefills by itself.
SLOW, FAST = WorkerLoad(prefill_tokens_per_s=1.0), WorkerLoad(prefill_tokens_per_s=1000.0)


async def add_prefill(router: Router, worker_id: str, **fields: Any) -> None:
    await router.announce(decode_record(worker_id, "127.0.0.1:1", role="prefill", **fields))
    await router.until(lambda: worker_id in {record.worker_id for record in router.fleet.prefill_workers()})


async def route_of(router: Router, prompt: list[int] = LONG, **fields: Any) -> str:
    """The beginning of the header: which workers, and the hit tokens expected."""
    response = await router.complete(prompt=prompt, max_tokens=1, **fields)
    assert response.status_code == 200, response.text
    return str(response.headers["x-baton-route"]).split("; reason=")[0]


async def test_the_index_s_hits_choose_the_workers(make_router: RouterFactory) -> None:
    router = await make_router()
    for worker_id in ("decode-0", "decode-1"):
        await router.add_worker(worker_id)
    for worker_id in ("prefill-0", "prefill-1"):
        await add_prefill(router, worker_id)
    hashes = CHAIN.hashes(LONG)
    router.index.publish("decode-1", hashes[:10])
    router.index.publish("prefill-1", hashes[:20])
    route = await route_of(router)
    assert route == "decode=decode-1; prefill=prefill-1; predicted_hit_tokens=80"
    submit = router.workers["decode-1"].submits[0]
    assert (submit.prefill_worker_id, submit.prefill_address) == ("prefill-1", "127.0.0.1:1")
    router.index.publish("decode-1", hashes)
    assert await route_of(router) == "decode=decode-1; prefill=local; predicted_hit_tokens=196"


async def test_another_salt_hits_nothing(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    router.index.publish("decode-0", CHAIN.hashes(LONG, "tenant"))
    assert (await route_of(router, cache_salt="tenant")).endswith("=196")
    assert (await route_of(router)).endswith("=0")


async def test_a_burst_spreads_over_equal_workers_before_any_has_told_its_load(
    make_router: RouterFactory,
) -> None:
    router = await make_router()
    workers = [await router.add_worker(f"decode-{i}", is_held=True, load=SLOW) for i in range(2)]
    for worker_id in ("prefill-0", "prefill-1"):
        await add_prefill(router, worker_id, load=FAST)
    answers = [asyncio.create_task(router.complete(prompt=[*LONG, i], max_tokens=1)) for i in range(8)]
    for worker in workers:
        await worker.until(lambda worker=worker: len(worker.submits) == 4)
    prefill_ids = [submit.prefill_worker_id for worker in workers for submit in worker.submits]
    assert sorted(prefill_ids) == ["prefill-0"] * 4 + ["prefill-1"] * 4
    for worker in workers:
        await worker.release()
    assert {response.status_code for response in await asyncio.gather(*answers)} == {200}


async def test_requests_that_a_worker_has_not_told_of_yet_count_as_its_load(
    make_router: RouterFactory,
) -> None:
    router = await make_router(policy="least_loaded")
    busy = await router.add_worker("decode-0", is_held=True)
    idle = await router.add_worker("decode-1")
    first = asyncio.create_task(router.complete(prompt=LONG, max_tokens=1))
    await busy.until(lambda: len(busy.submits) == 1)
    # Equal workers would take turns: every second one would go to the busy worker.
    assert {(await route_of(router)).split(";")[0] for _ in range(4)} == {"decode=decode-1"}
    assert len(idle.submits) == 4
    await busy.release()
    assert (await first).status_code == 200


async def test_a_prompt_that_a_decode_worker_computes_itself_counts_until_its_first_token(
    make_router: RouterFactory,
) -> None:
    router = await make_router()
    busy = await router.add_worker("decode-0", is_held=True)
    await router.add_worker("decode-1")
    router.index.publish("decode-1", CHAIN.hashes(LONG[:4]))
    answer = asyncio.create_task(router.complete(prompt=[7] * 100, max_tokens=9, ignore_eos=True))
    await busy.until(lambda: len(busy.submits) == 1)
    [told, _] = router.fleet.decode_workers()
    planner = router.app.state.serving.planner
    assert planner.decode_candidate(*told, {}).num_waiting_tokens == 100
    busy.hold_after = 1
    busy.is_held = False
    busy._notify()
    await busy.until(lambda: busy.num_emitted == 1)
    assert (await route_of(router)).startswith("decode=decode-1")
    assert planner.decode_candidate(*told, {}).num_waiting_tokens == 0
    await busy.release()
    assert (await answer).status_code == 200


async def test_a_prefill_worker_that_drains_gets_nothing_new(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0", load=SLOW)
    await add_prefill(router, "prefill-0", load=FAST)
    assert "prefill=prefill-0" in await route_of(router)
    record = next(r for r in await router.registry.list() if r.worker_id == "prefill-0")
    await router.announce(replace(record, is_draining=True))
    await router.until(lambda: router.fleet._records["prefill-0"].is_draining)
    assert "prefill=local" in await route_of(router)


async def test_a_loaded_prefill_worker_is_avoided(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0", load=SLOW)
    await add_prefill(router, "prefill-0", load=replace(FAST, num_waiting_tokens=5000))
    await add_prefill(router, "prefill-1", load=FAST)
    assert {(await route_of(router)).split("; ")[1] for _ in range(3)} == {"prefill=prefill-1"}


async def test_workers_that_drain_or_leave_get_nothing_new(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    await router.add_worker("decode-1")
    await add_prefill(router, "prefill-0")
    record = next(r for r in await router.registry.list() if r.worker_id == "decode-0")
    await router.announce(replace(record, is_draining=True))
    await router.until(lambda: router.linked() == ["decode-1"])
    await router.registry.withdraw("prefill-0")
    await router.until(lambda: router.fleet.prefill_workers() == [])
    assert await route_of(router) == "decode=decode-1; prefill=local; predicted_hit_tokens=0"


async def test_a_worker_that_left_the_registry_still_finishes_what_it_has(make_router: RouterFactory) -> None:
    router = await make_router()
    worker = await router.add_worker("decode-0", hold_after=2)
    answer = asyncio.create_task(router.complete(ignore_eos=True))
    await worker.until(lambda: worker.num_emitted == 2)
    await router.registry.withdraw("decode-0")
    await router.until(lambda: router.linked() == [])
    await worker.release()
    assert (await answer).json()["usage"]["completion_tokens"] == 8
    await worker.until(lambda: worker.num_links_broken == 1)


async def test_ready_follows_the_fleet(make_router: RouterFactory) -> None:
    router = await make_router()
    assert (await router.client.get("/ready")).status_code == 503
    await router.add_worker("decode-0")
    assert (await router.client.get("/ready")).status_code == 200
    await router.registry.withdraw("decode-0")
    await router.until(lambda: router.linked() == [])
    assert (await router.client.get("/ready")).status_code == 503


async def test_the_shortest_context_of_the_workers_counts(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0")
    record = (await router.registry.list())[0]
    await router.announce(replace(record, max_model_len=100))
    await router.until(lambda: router.fleet.max_model_len() == 100)
    response = await router.complete(prompt=LONG)
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_decisions_and_predictions_are_counted(make_router: RouterFactory) -> None:
    router = await make_router()
    await router.add_worker("decode-0", num_hit_tokens=8)
    router.index.publish("decode-0", CHAIN.hashes(LONG[:12]))
    await route_of(router)
    reasons = 'decode_reason="least_cost",model_name="test",prefill_reason="no_prefill_worker"'
    name = f"baton_router_decisions_total{{{reasons}}}"
    assert await router.metric(name) == 1
    assert await router.metric("baton_router_predicted_hit_tokens_total") == 12
    assert await router.metric("baton_router_hit_tokens_total") == 8


async def test_an_idle_link_s_load_is_old_and_the_registry_s_counts(make_router: RouterFactory) -> None:
    """Another router keeps the worker busy: nothing comes down this one's link."""
    router = await make_router()
    await router.add_worker("decode-0")
    [(record, link)] = router.fleet.decode_workers()
    planner = router.app.state.serving.planner
    assert planner.decode_candidate(record, link, {}).num_requests == 0
    busy = replace(record, load=WorkerLoad(num_running=7, num_waiting_tokens=900, num_free_blocks=10))
    link._told_at -= 10.0
    await router.announce(busy)
    await router.until(lambda: router.fleet._records["decode-0"].load == busy.load)
    candidate = planner.decode_candidate(busy, link, {})
    assert (candidate.num_requests, candidate.num_waiting_tokens) == (7, 900)
    assert (candidate.num_free_tokens, candidate.num_total_tokens) == (40, 4000)
    await route_of(router)  # the worker tells on the link again
    assert planner.decode_candidate(busy, link, {}).num_requests == 0


async def test_what_was_considered_is_not_kept_with_the_request(make_router: RouterFactory) -> None:
    router = await make_router()
    worker = await router.add_worker("decode-0", is_held=True)
    flows: list[Any] = []
    planner = router.app.state.serving.planner
    honest = planner.plan
    object.__setattr__(
        planner, "plan", lambda *args, **kwargs: flows.append(honest(*args, **kwargs)) or flows[-1]
    )
    answer = asyncio.create_task(router.complete(prompt=LONG))
    await worker.until(lambda: len(worker.submits) == 1)
    assert [len(route.decision.options) for route in flows] == [0]
    await worker.release()
    assert (await answer).status_code == 200
