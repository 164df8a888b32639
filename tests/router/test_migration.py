"""A sequence outlives its worker: no token lost, none twice, and retries have bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from kvstore.block_hash import HashChain
from proto import common_pb2
from tests.fakes.fake_decode_worker import FakeDecodeWorker, decode_record, mixing_script
from tests.router.conftest import Router, RouterFactory

PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 40


def expected_ids(num_tokens: int = NUM_TOKENS) -> list[int]:
    script, output = mixing_script(300), []
    for _ in range(num_tokens):
        output.append(script(PROMPT, output))
    return output


def error(kind: int, message: str = "told by the test") -> common_pb2.Error:
    return common_pb2.Error(kind=kind, message=message)


async def stream_ids(router: Router, **fields: Any) -> list[int]:
    """Of a streamed completion; asserts that text and usage agree with the tokens."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    response = await router.complete(
        prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **options, **fields
    )
    assert response.status_code == 200, response.text
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in chunks), response.text
    token_ids = [id for chunk in chunks for choice in chunk["choices"] for id in choice["token_ids"]]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    tokenizer = router.app.state.serving.tokenizer
    assert text == tokenizer.decode(token_ids)
    assert chunks[-1]["usage"]["completion_tokens"] == len(token_ids)
    return token_ids


async def two_workers(make_router: RouterFactory, **fields: Any) -> tuple[Router, list[FakeDecodeWorker]]:
    router = await make_router(policy="round_robin")
    return router, [await router.add_worker(f"decode-{i}", **fields) for i in range(2)]


@pytest.mark.parametrize("num_before", [1, 7, 39])
@pytest.mark.parametrize("tokens_per_update", [1, 3])
async def test_a_stream_goes_on_exactly_when_its_worker_dies(
    make_router: RouterFactory, num_before: int, tokens_per_update: int
) -> None:
    router, [first, second] = await two_workers(make_router, tokens_per_update=tokens_per_update)
    first.hold_after = num_before
    answer = asyncio.create_task(stream_ids(router))
    await first.until(lambda: first.num_emitted == num_before)
    await first.kill()
    assert await answer == expected_ids()
    [submit] = second.submits
    output_ids = list(submit.sequence.output_ids)
    assert output_ids == expected_ids()[: len(output_ids)]
    assert list(submit.sequence.prompt_ids) == PROMPT
    assert submit.sequence.sampling == first.submits[0].sequence.sampling
    assert await router.metric("baton_router_migrations_total") == 1


async def branch_ids(router: Router, n: int) -> dict[int, list[int]]:
    """Token ids of each choice of a streamed completion."""
    body = {"model": "test", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "n": n}
    response = await router.complete(**body, stream=True, return_token_ids=True, seed=1)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert response.status_code == 200 and not any("error" in chunk for chunk in chunks), response.text
    ids: dict[int, list[int]] = {index: [] for index in range(n)}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        ids[choice["index"]] += choice["token_ids"]
    return ids


@pytest.mark.parametrize("num_before", [0, 7])
async def test_branches_migrate_together(make_router: RouterFactory, num_before: int) -> None:
    """To one of the workers that are left, named as a group there: it computes their prompt once."""
    router = await make_router(policy="round_robin")
    workers = [await router.add_worker(f"decode-{i}", hold_after=num_before) for i in range(4)]
    answer = asyncio.create_task(branch_ids(router, 4))
    await workers[0].until(lambda: len(workers[0].submits) == 4 and workers[0].num_emitted == 4 * num_before)
    for worker in workers[1:]:
        await worker.release()
    await workers[0].kill()
    assert await answer == dict.fromkeys(range(4), expected_ids())
    [group] = {submit.branch_group for submit in workers[0].submits}
    [moved] = [worker.submits for worker in workers[1:] if worker.submits]
    assert [submit.branch_group for submit in moved] == [group] * 4 and group
    seeds = [submit.sequence.sampling.seed for submit in workers[0].submits]
    assert sorted(submit.sequence.sampling.seed for submit in moved) == sorted(seeds)


async def test_branches_that_wait_for_a_worker_go_to_one(make_router: RouterFactory) -> None:
    router = await make_router(policy="round_robin")
    first = await router.add_worker("decode-0", hold_after=3)
    answer = asyncio.create_task(branch_ids(router, 3))
    await first.until(lambda: first.num_emitted == 9)
    await first.kill()
    await router.until(lambda: router.linked() == [])
    fresh = [FakeDecodeWorker(mixing_script(300)) for _ in range(2)]
    for i, worker in enumerate(fresh, 1):
        router.workers[f"decode-{i}"] = worker
        await router.announce(decode_record(f"decode-{i}", await worker.start()))
    assert await answer == dict.fromkeys(range(3), expected_ids())
    [moved] = [worker.submits for worker in fresh if worker.submits]
    assert len({submit.branch_group for submit in moved}) == 1 and len(moved) == 3


async def test_a_branch_that_was_sent_away_does_not_follow_the_others(make_router: RouterFactory) -> None:
    router, [first, second] = await two_workers(make_router)
    first.errors = [error(common_pb2.ERROR_KIND_OVERLOADED)]
    assert await branch_ids(router, 3) == dict.fromkeys(range(3), expected_ids())
    assert (len(first.submits), len(second.submits)) == (3, 1)


async def test_a_worker_that_dies_before_the_first_token_costs_nothing(make_router: RouterFactory) -> None:
    router, [first, second] = await two_workers(make_router, is_held=False)
    first.is_held = True
    answer = asyncio.create_task(stream_ids(router))
    await first.until(lambda: len(first.submits) == 1)
    await first.kill()
    assert await answer == expected_ids()
    assert second.submits[0].sequence.output_ids == []


async def test_the_only_worker_may_come_back(make_router: RouterFactory) -> None:
    router = await make_router()
    first = await router.add_worker("decode-0", hold_after=5)
    answer = asyncio.create_task(stream_ids(router))
    await first.until(lambda: first.num_emitted == 5)
    await first.kill()
    await router.until(lambda: router.linked() == [])
    again = FakeDecodeWorker(mixing_script(300))
    router.workers["decode-0"] = again
    record = decode_record("decode-0", await again.start(), incarnation="decode-0-2")
    await router.announce(record)
    assert await answer == expected_ids()


async def test_a_broken_link_to_a_living_worker_is_made_again(make_router: RouterFactory) -> None:
    router = await make_router()
    worker = await router.add_worker("decode-0", hold_after=5)
    answer = asyncio.create_task(stream_ids(router))
    await worker.until(lambda: worker.num_emitted == 5)
    await worker.kill()
    await router.until(lambda: router.linked() == [])
    worker.hold_after = None
    await worker.start(worker.port)
    assert await answer == expected_ids()
    [_, again] = worker.submits
    output_ids = list(again.sequence.output_ids)
    assert output_ids == expected_ids()[: len(output_ids)]


async def test_a_draining_worker_s_sequence_goes_elsewhere(make_router: RouterFactory) -> None:
    router, [first, second] = await two_workers(make_router)
    first.errors = [error(common_pb2.ERROR_KIND_WORKER_LOST, "draining")]
    assert await stream_ids(router) == expected_ids()
    assert len(first.submits) == len(second.submits) == 1


async def test_the_worker_that_sent_a_sequence_away_is_not_asked_again(make_router: RouterFactory) -> None:
    router = await make_router()
    first = await router.add_worker("decode-0")
    second = await router.add_worker("decode-1")
    chain = HashChain(model_fingerprint="weights", block_size=4)
    router.index.publish("decode-0", chain.hashes(PROMPT))  # it would be chosen every time
    first.errors = [error(common_pb2.ERROR_KIND_WORKER_LOST, "draining") for _ in range(9)]
    second.errors = [error(common_pb2.ERROR_KIND_HANDOFF_FAILED)]
    assert await stream_ids(router) == expected_ids()
    assert (len(first.submits), len(second.submits)) == (1, 2)


async def test_an_overloaded_worker_s_sequence_goes_elsewhere(make_router: RouterFactory) -> None:
    router, [first, second] = await two_workers(make_router)
    first.errors = [error(common_pb2.ERROR_KIND_OVERLOADED)]
    assert await stream_ids(router) == expected_ids()
    assert len(second.submits) == 1


async def test_a_failed_hand_off_is_tried_again_without_a_prefill_worker(make_router: RouterFactory) -> None:
    router = await make_router(policy="round_robin", local_prefill_max_tokens=0)
    worker = await router.add_worker("decode-0")
    for worker_id in ("prefill-0", "prefill-1"):
        await router.announce(decode_record(worker_id, "127.0.0.1:1", role="prefill"))
    await router.until(lambda: len(router.fleet.prefill_workers()) == 2)
    worker.errors = [error(common_pb2.ERROR_KIND_HANDOFF_FAILED)]
    assert await stream_ids(router) == expected_ids()
    assert [submit.prefill_worker_id for submit in worker.submits] == ["prefill-0", ""]
    left = [record.worker_id for record in router.fleet.prefill_workers()]
    assert left == ["prefill-1"]  # the other is left alone for a while


async def test_retries_have_a_bound(make_router: RouterFactory) -> None:
    router = await make_router(max_retries=2)
    worker = await router.add_worker("decode-0")
    worker.errors = [error(common_pb2.ERROR_KIND_HANDOFF_FAILED, "told") for _ in range(9)]
    response = await router.complete()
    assert response.status_code == 500
    assert len(worker.submits) == 3


@pytest.mark.parametrize(
    ("kind", "status"),
    [(common_pb2.ERROR_KIND_INVALID_REQUEST, 400), (common_pb2.ERROR_KIND_INTERNAL, 500)],
)
async def test_what_another_worker_would_say_too_is_not_retried(
    make_router: RouterFactory, kind: int, status: int
) -> None:
    router, [first, second] = await two_workers(make_router)
    first.errors = [error(kind)]
    response = await router.complete()
    assert response.status_code == status
    assert response.json()["error"]["message"] == "told by the test"
    assert second.submits == []


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(make_router: RouterFactory) -> None:
    router = await make_router(max_retries=0)
    worker = await router.add_worker("decode-0", hold_after=5)
    body = {"model": "test", "prompt": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 50}
    async with router.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        await anext(lines)
        await worker.kill()
        rest = [line async for line in lines if line]
    assert response.status_code == 200
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["type"] == "server_error"


async def test_a_request_ends_at_its_deadline_in_any_state(make_router: RouterFactory) -> None:
    router = await make_router(request_timeout_s=0.2)
    worker = await router.add_worker("decode-0", is_held=True)
    response = await router.complete()
    assert response.status_code == 503
    await worker.until(lambda: bool(worker.cancelled))
    await worker.kill()
    await router.until(lambda: router.linked() == [])
    assert (await router.complete()).status_code == 503
