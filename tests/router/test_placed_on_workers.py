"""The router with real services and engines: what workers measure reaches the costs, and what the policy
expects of caches comes true."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.outputs import StepOutput
from tests.fakes.fake_decode_worker import decode_record
from tests.fakes.fake_model import build_fake_engine
from tests.fakes.fake_workers import FakeWorker, decode_worker, prefill_worker
from tests.router.conftest import Router, RouterFactory


async def announce(router: Router, worker: FakeWorker, role: Any) -> None:
    """As worker/worker_process.py does."""
    layout = worker.engine.engine.kv_layout
    record = decode_record(
        worker.worker_id,
        worker.address,
        role=role,
        host_id=worker.transfers.host_id,
        model_fingerprint=layout.model_fingerprint,
        layout_fingerprint=layout.fingerprint,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        num_blocks=worker.load.num_blocks,
        load=worker.load.load(),
    )
    await router.announce(record)
    await router.until(lambda: router.fleet._records.get(record.worker_id) == record)


@asynccontextmanager
async def workers(router: Router) -> AsyncIterator[dict[Any, FakeWorker]]:
    async with (
        prefill_worker(build_fake_engine(num_blocks=256)) as prefill,
        decode_worker(build_fake_engine(num_blocks=256)) as decode,
    ):
        by_role = {"prefill": prefill, "decode": decode}
        for role, worker in by_role.items():
            worker.load.add_kv_rates(worker.transfers.rates.kv_rates)

            def publish(step: StepOutput, worker_id: str = worker.worker_id) -> None:
                router.index.evict(worker_id, step.block_events.removed)
                router.index.publish(worker_id, [block_hash for block_hash, _ in step.block_events.placed])

            worker.engine.subscribe(publish)
            await announce(router, worker, role)
        await router.until(lambda: router.linked() == [decode.worker_id])
        yield by_role


async def ask(router: Router, prompt: list[int]) -> tuple[dict[str, str], int]:
    """The route, and the prompt tokens that came from a cache."""
    response = await router.complete(prompt=prompt, max_tokens=4, ignore_eos=True)
    assert response.status_code == 200, response.text
    route = dict(pair.split("=", 1) for pair in response.headers["x-baton-route"].split("; "))
    return route, response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def prompt_of(first: int, length: int = 200) -> list[int]:
    return [first, *((7 * i + first) % 90 + 5 for i in range(length - 1))]


async def test_what_workers_measure_becomes_what_routes_cost(make_router: RouterFactory) -> None:
    router = await make_router(policy="round_robin")  # hands every long prompt off
    async with workers(router) as by_role:
        for first in range(5, 15):
            route, _ = await ask(router, prompt_of(first, 60 + 10 * first))
            assert route["prefill"] == "prefill-a"
        loads = {}
        for role, worker in by_role.items():
            await announce(router, worker, role)
            loads[role] = router.fleet._records[worker.worker_id].load
        assert loads["prefill"].prefill_token_s > 0
        assert loads["prefill"].decode_seq_s is None
        assert loads["decode"].prefill_token_s is None
        assert loads["decode"].step_s is not None
        assert set(loads["decode"].kv_rates) == {"stream"}
        route, _ = await ask(router, prompt_of(50))
        expected_s = loads["prefill"].step_s + 200 * loads["prefill"].prefill_token_s
        assert float(route["compute_s"]) == pytest.approx(expected_s, rel=0.3, abs=2e-4)  # near a median
        for worker in by_role.values():
            await worker.until_idle()


async def test_hits_come_as_expected(make_router: RouterFactory) -> None:
    router = await make_router()
    async with workers(router) as by_role:
        await ask(router, prompt_of(9))
        for length in (200, 150, 100):
            route, num_cached = await ask(router, prompt_of(9, length))
            assert int(route["predicted_hit_tokens"]) == num_cached >= length - 4
        assert await router.metric("baton_router_hit_error_tokens_sum") == 0
        for worker in by_role.values():
            await worker.until_idle()
