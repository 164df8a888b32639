"""One contract for both registries. The Redis one runs on real time, so its leases here are short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from kvstore.memory_registry import MemoryRegistry
from kvstore.registry import RedisRegistry, Registry, WorkerLoad, WorkerRecord
from kvstore.store import Store
from servicekit.clock import FakeClock
from tests.fakes.redis_server import worker_record

LEASE_S = 0.3


@dataclass
class Backend:
    registry: Registry
    other: Registry  # another process that sees the same workers
    pass_lease: Callable[[], Awaitable[None]]


@pytest.fixture(params=["memory", "redis"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "memory":
        clock = FakeClock()
        memory = MemoryRegistry(clock.monotonic, relist_s=0.01)

        async def advance() -> None:
            clock.advance(LEASE_S)

        yield Backend(memory, memory, advance)
        return
    store = Store(request.getfixturevalue("redis_url"))

    async def wait() -> None:
        await asyncio.sleep(LEASE_S)  # leases run on the server's clock

    yield Backend(RedisRegistry(store, "tiny", relist_s=0.05), RedisRegistry(store, "tiny"), wait)
    await store.close()


async def next_that(
    watch: AsyncIterator[list[WorkerRecord]], is_wanted: Callable[[list[WorkerRecord]], bool]
) -> list[WorkerRecord]:
    async with asyncio.timeout(10):
        async for workers in watch:
            if is_wanted(workers):
                return workers
    raise AssertionError("watch() ended")


def watching(registry: Registry) -> aclosing[Any]:
    return aclosing(cast(Any, registry.watch()))


async def test_an_announced_worker_is_listed_until_withdrawn(backend: Backend) -> None:
    await backend.registry.announce(worker_record(), LEASE_S)
    assert await backend.other.list() == [worker_record()]
    await backend.registry.withdraw("decode-0")
    assert await backend.other.list() == []


async def test_withdrawing_twice_is_harmless(backend: Backend) -> None:
    await backend.registry.announce(worker_record(), LEASE_S)
    await backend.registry.withdraw("decode-0")
    await backend.registry.withdraw("decode-0")
    assert await backend.other.list() == []


async def test_workers_are_listed_by_worker_id(backend: Backend) -> None:
    for worker_id in ("b", "c", "a"):
        await backend.registry.announce(worker_record(worker_id), 60.0)
    assert [record.worker_id for record in await backend.other.list()] == ["a", "b", "c"]


async def test_a_lease_that_nobody_renews_ends(backend: Backend) -> None:
    await backend.registry.announce(worker_record("ends"), LEASE_S)
    await backend.registry.announce(worker_record("stays"), 60.0)
    await backend.pass_lease()
    assert await backend.other.list() == [worker_record("stays")]


async def test_renewal_lengthens_the_lease_and_brings_the_load(backend: Backend) -> None:
    busy = worker_record(load=WorkerLoad(num_running=7))
    await backend.registry.announce(worker_record(), 60.0)
    assert await backend.registry.renew(busy)
    assert await backend.other.list() == [busy]


async def test_renewal_after_the_lease_has_ended_announces_again(backend: Backend) -> None:
    await backend.registry.announce(worker_record(), LEASE_S)
    await backend.pass_lease()
    assert await backend.other.list() == []
    assert await backend.registry.renew(worker_record())
    assert await backend.other.list() == [worker_record()]


async def test_renewal_without_announcement_is_a_mistake(backend: Backend) -> None:
    with pytest.raises(AssertionError, match="was not announced"):
        await backend.registry.renew(worker_record())


async def test_a_restart_takes_over_and_the_earlier_incarnation_is_told(backend: Backend) -> None:
    restarted = worker_record(incarnation="second")
    await backend.registry.announce(worker_record(), 60.0)
    await backend.other.announce(restarted, 60.0)
    assert not await backend.registry.renew(worker_record())
    assert await backend.other.renew(restarted)
    assert await backend.other.list() == [restarted]


async def test_watch_begins_with_what_is_there(backend: Backend) -> None:
    async with watching(backend.other) as watch:
        assert await anext(watch) == []
    await backend.registry.announce(worker_record(), 60.0)
    async with watching(backend.other) as watch:
        assert await anext(watch) == [worker_record()]


async def test_watch_shows_arrival_draining_load_and_withdrawal(backend: Backend) -> None:
    draining = worker_record(is_draining=True)
    busy = replace(draining, load=WorkerLoad(num_waiting=2))
    async with watching(backend.other) as watch:
        assert await anext(watch) == []
        await backend.registry.announce(worker_record(), 60.0)
        await next_that(watch, lambda workers: workers == [worker_record()])
        await backend.registry.renew(draining)
        await next_that(watch, lambda workers: workers == [draining])
        await backend.registry.renew(busy)
        await next_that(watch, lambda workers: workers == [busy])
        await backend.registry.withdraw("decode-0")
        await next_that(watch, lambda workers: workers == [])


async def test_watch_shows_that_a_lease_has_ended(backend: Backend) -> None:
    async with watching(backend.other) as watch:
        await backend.registry.announce(worker_record(), LEASE_S)
        await next_that(watch, lambda workers: len(workers) == 1)
        await backend.pass_lease()
        await next_that(watch, lambda workers: workers == [])
