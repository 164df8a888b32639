from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.embedded import EmbeddedServer
from kvstore.registry import RedisRegistry, WorkerLoad
from kvstore.store import MAX_BLOCK_S, Store, StoreUnavailable
from tests.fakes.redis_server import worker_record


async def test_every_key_has_a_lifetime_no_longer_than_the_longest_lease(store: Store) -> None:
    registry = RedisRegistry(store, "tiny")
    await registry.announce(worker_record("long"), 50.0)
    await registry.announce(worker_record("short"), 5.0)
    lifetimes = {key: await store.redis.pttl(key) for key in await store.redis.keys("*")}
    assert len(lifetimes) == 2
    assert all(45_000 < lifetime_ms <= 50_000 for lifetime_ms in lifetimes.values())


async def test_models_do_not_see_each_other(store: Store) -> None:
    await RedisRegistry(store, "a").announce(worker_record("w"), 60.0)
    assert await RedisRegistry(store, "a:wrk").list() == []
    assert await RedisRegistry(store, "b").list() == []


async def test_an_earlier_incarnation_cannot_withdraw_its_successor(store: Store) -> None:
    old, new = RedisRegistry(store, "tiny"), RedisRegistry(store, "tiny")
    await old.announce(worker_record(), 60.0)
    await new.announce(worker_record(incarnation="second"), 60.0)
    await old.withdraw("decode-0")
    assert await new.list() == [worker_record(incarnation="second")]


async def test_arrival_and_withdrawal_are_pushed_to_watchers(store: Store) -> None:
    registry = RedisRegistry(store, "tiny", relist_s=MAX_BLOCK_S)
    watch = registry.watch()
    async with asyncio.timeout(MAX_BLOCK_S):  # listing again would come too late
        assert await anext(watch) == []
        arrival = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await registry.announce(worker_record(), 60.0)
        assert await arrival == [worker_record()]
        departure = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await registry.withdraw("decode-0")
        assert await departure == []


async def test_redis_away_is_store_unavailable(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, url = mortal_redis
    registry = RedisRegistry(mortal_store, "tiny")
    await registry.announce(worker_record(), 60.0)
    server.kill()
    for call in (registry.list(), registry.renew(worker_record()), registry.withdraw("decode-0")):
        with pytest.raises(StoreUnavailable, match=url):
            await call


async def test_watchers_keep_workers_over_a_restart_of_redis_and_drop_those_who_do_not_return(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    registry = RedisRegistry(mortal_store, "tiny", relist_s=0.05)
    lease_s = 1.0
    dead, alive = worker_record("dead"), worker_record("alive")
    busy = worker_record("alive", load=WorkerLoad(num_running=1))
    await registry.announce(dead, lease_s)
    await registry.announce(alive, 60.0)
    async with asyncio.timeout(20):
        watch = registry.watch()
        assert await anext(watch) == [alive, dead]
        following = asyncio.ensure_future(anext(watch))
        server.kill()
        await asyncio.sleep(1.5 * lease_s)  # longer than the lease: nobody is dropped while Redis is away
        assert not following.done()
        server.start()
        back_at = time.monotonic()
        await registry.renew(busy)
        assert await following == [busy, dead]
        assert await anext(watch) == [busy]
        assert time.monotonic() - back_at > 0.5 * lease_s


async def test_renewal_brings_a_worker_back_after_redis_lost_everything(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    registry = RedisRegistry(mortal_store, "tiny")
    await registry.announce(worker_record(), 60.0)
    server.kill()
    server.start()
    assert await registry.list() == []
    assert await registry.renew(worker_record())
    assert await registry.list() == [worker_record()]
