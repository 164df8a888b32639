from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvstore import keys
from kvstore.block_hash import BlockHash, BlockTier, HashChain
from kvstore.block_order import place_bytes
from kvstore.embedded import EmbeddedServer
from kvstore.index_mirror import IndexMirror
from kvstore.redis_index import RedisIndex
from kvstore.store import Store, StoreUnavailable
from servicekit.clock import FakeClock
from tests.fakes.redis_server import ObservedIndex

LEASE_S = 30.0


def blocks(*numbers: int) -> set[BlockHash]:
    return {BlockHash(number.to_bytes(16, "little")) for number in numbers}


@asynccontextmanager
async def writing(
    store: Store, worker_id: str = "w", incarnation: str = "first", lease_s: float = LEASE_S
) -> AsyncIterator[RedisIndex]:
    index = RedisIndex(store, "tiny", worker_id, incarnation, lease_s=lease_s)
    index.start()
    try:
        yield index
    finally:
        await index.stop()


@asynccontextmanager
async def following(
    store: Store, audit_s: float = 3600.0
) -> AsyncIterator[tuple[IndexMirror, ObservedIndex]]:
    """A mirror that runs; by default it never audits again after the start."""
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown, audit_s=audit_s)
    task = asyncio.create_task(mirror.run())
    try:
        yield mirror, shown
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def flushed(index: RedisIndex) -> None:
    async with asyncio.timeout(10):
        await index.flush()


async def stored_blocks(store: Store, worker_id: str = "w", incarnation: str = "first") -> set[bytes]:
    return set(await store.redis.hkeys(keys.worker_blocks("tiny", worker_id, incarnation)))


async def stored_tiers(store: Store) -> list[set[bytes]]:
    """Of worker w: what is in which tier."""
    tiers = await store.redis.hgetall(keys.worker_blocks("tiny", "w", "first"))
    return [{block for block, now in tiers.items() if int(now[:1]) == tier} for tier in BlockTier]


async def lose_events(store: Store) -> None:
    await store.redis.xtrim(keys.index_events("tiny"), maxlen=0, approximate=False)


def shows(worker_id: str, expected: set[BlockHash]) -> Callable[[ObservedIndex], bool]:
    return lambda shown: shown.blocks(worker_id) == expected


async def test_changes_reach_redis_and_every_mirror(store: Store) -> None:
    async with writing(store) as index, following(store) as (_, one), following(store) as (_, two):
        index.publish(blocks(1, 2, 3))
        await one.wait_until(shows("w", blocks(1, 2, 3)))
        index.evict(blocks(2, 99))
        await one.wait_until(shows("w", blocks(1, 3)))
        await two.wait_until(shows("w", blocks(1, 3)))
        assert await stored_blocks(store) == blocks(1, 3)


async def test_a_block_is_in_its_fastest_tier_only_in_redis_and_in_every_mirror(store: Store) -> None:
    async with writing(store) as index, following(store) as (_, shown):
        index.publish(blocks(1, 2, 3, 4))
        await flushed(index)
        index.publish(blocks(2, 3), BlockTier.HOST)
        index.publish(blocks(4), BlockTier.DISK)
        index.evict(blocks(1))
        await flushed(index)
        assert await stored_tiers(store) == [set(), blocks(2, 3), blocks(4)]
        index.publish(blocks(3), BlockTier.DEVICE)
        await flushed(index)
        assert await stored_tiers(store) == [blocks(3), blocks(2), blocks(4)]
        tiers = dict.fromkeys(blocks(3), BlockTier.DEVICE) | dict.fromkeys(blocks(2), BlockTier.HOST)
        tiers |= dict.fromkeys(blocks(4), BlockTier.DISK)
        await shown.wait_until(lambda shown: shown.tiers("w") == tiers)


async def test_only_the_last_of_several_changes_of_a_block_is_told(store: Store) -> None:
    async with writing(store) as index:
        await flushed(index)
        before = await store.redis.xlen(keys.index_events("tiny"))
        index.publish(blocks(1, 2), BlockTier.DEVICE)
        index.publish(blocks(1, 2), BlockTier.DISK)
        index.evict(blocks(1))
        index.publish(blocks(2), BlockTier.DISK)
        await flushed(index)
        assert await stored_tiers(store) == [set(), set(), blocks(2)]
        assert await store.redis.xlen(keys.index_events("tiny")) == before + 1


async def test_a_snapshot_brings_the_tiers(store: Store) -> None:
    async with writing(store) as index:
        for tier, numbers in zip(BlockTier, (range(3000), range(3000, 4000), range(4000, 4500)), strict=True):
            index.publish(blocks(*numbers), tier)
        await flushed(index)
        shown = ObservedIndex()
        await IndexMirror(store, "tiny", shown).catch_up()
        tiers = list(shown.tiers("w").values())
        assert [tiers.count(tier) for tier in BlockTier] == [3000, 1000, 500]


async def chats_at_a_worker(index: RedisIndex) -> list[list[BlockHash]]:
    """Prompts that share nothing, computed by turns in steps of 32 blocks; then the end of each moves to host
    memory, last blocks first, and a middle part after that. Whole steps: what is left of a run that lost a
    member is no run."""
    chain = HashChain(model_fingerprint="tiny", block_size=1)
    prompts = [chain.hashes(range(1600), cache_salt=str(number)) for number in range(3)]
    for start in range(0, 1600, 32):
        for prompt in prompts:
            index.publish(prompt[start : start + 32])
        await flushed(index)
    for prompt in prompts:
        for part in (prompt[1184:], prompt[416:1184]):
            for block_hash in reversed(part):
                index.publish([block_hash], BlockTier.HOST)
            await flushed(index)
    return prompts


@pytest.mark.parametrize("is_new", [True, False], ids=["snapshot", "events"])
async def test_mirrors_know_prompts_in_order_before_the_first_lookup(store: Store, is_new: bool) -> None:
    shown, follower = ObservedIndex(), ObservedIndex()
    following_mirror = IndexMirror(store, "tiny", follower)
    async with writing(store) as index:
        await flushed(index)
        await following_mirror.catch_up()
        prompts = await chats_at_a_worker(index)
        await following_mirror.catch_up()
        await IndexMirror(store, "tiny", shown).catch_up()
    asked = shown if is_new else follower
    asked.check_integrity()
    num_runs = asked._last_run
    for prompt in prompts:
        [hit] = asked.lookup(prompt)
        assert hit.num_blocks_by_tier == (416, 1184, 0)
    assert asked._last_run == num_runs  # the lookups found runs; they had to make none


async def test_a_block_keeps_its_place_in_every_tier_and_gets_a_new_one_when_it_comes_again(
    store: Store,
) -> None:
    first, second, third = (BlockHash(bytes([number]) * 16) for number in (3, 2, 1))

    async def order() -> list[bytes]:
        stored = await store.redis.hgetall(keys.worker_blocks("tiny", "w", "first"))
        return sorted(stored, key=lambda block_hash: stored[block_hash][1:])

    async with writing(store) as index:
        index.publish([first, second, third])
        await flushed(index)
        assert await order() == [first, second, third]
        index.publish([second], BlockTier.DISK)
        await flushed(index)
        assert await order() == [first, second, third]
        index.evict([first])
        await flushed(index)
        index.publish([first])
        await flushed(index)
        assert await order() == [second, third, first]


async def test_a_snapshot_that_redis_interrupts_leaves_the_mirror_as_it_was(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = mortal_redis
    shown = ObservedIndex()
    mirror = IndexMirror(mortal_store, "tiny", shown)
    async with writing(mortal_store) as index:
        index.publish(blocks(*range(10)))
        await flushed(index)
        await mirror.catch_up()
        index.publish(blocks(*range(10, 10_000)))
        await flushed(index)
        await lose_events(mortal_store)
        scan = mortal_store.redis.hscan

        async def scan_once(*args: object, **options: object) -> object:
            server.kill()
            monkeypatch.setattr(mortal_store.redis, "hscan", scan)
            return await scan(*args, **options)

        monkeypatch.setattr(mortal_store.redis, "hscan", scan_once)
        with pytest.raises(StoreUnavailable):
            await mirror.catch_up()
        assert shown.blocks("w") == blocks(*range(10))
        server.start()
        await flushed(index)
        await mirror.catch_up()
        assert shown.blocks("w") == blocks(*range(10_000))
        assert shown.num_blocks == 10_000
        shown.check_integrity()


async def test_requests_come_between_the_pieces_of_a_burst_and_of_a_sweep(store: Store) -> None:
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown)
    async with writing(store) as index:
        await flushed(index)
        await mirror.catch_up()
        index.publish(blocks(*range(20 * keys.MAX_EVENT_HASHES)))
        await flushed(index)
        seen: set[int] = set()

        async def look() -> None:
            while True:
                seen.add(shown.num_blocks)
                await asyncio.sleep(0)

        looking = asyncio.create_task(look())
        await mirror.catch_up()
        assert len(seen) >= 20
        seen.clear()
        await index.stop()
        await mirror.catch_up()
        looking.cancel()
        assert shown.num_blocks == 0
        assert len(seen) >= 100


async def test_a_full_mirror_shows_less_never_something_wrong_and_says_so_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    shown = ObservedIndex(max_blocks=100)
    mirror = IndexMirror(store, "tiny", shown)
    async with writing(store) as index:
        for start in range(0, 300, 50):
            index.publish(blocks(*range(start, start + 50)))
            await flushed(index)
            await mirror.catch_up()
        assert len(shown.blocks("w")) == shown.num_blocks == 100
        assert shown.blocks("w") < blocks(*range(300))
        assert [record.message for record in caplog.records].count("prefix_index_full") == 1


async def test_changes_before_start_count(store: Store) -> None:
    index = RedisIndex(store, "tiny", "w", "first")
    index.publish(blocks(1, 2))
    index.evict(blocks(1))
    index.start()
    await flushed(index)
    assert await stored_blocks(store) == blocks(2)
    await index.stop()


async def test_a_late_mirror_takes_a_snapshot(store: Store) -> None:
    async with writing(store) as index:
        index.publish(blocks(*range(5000)))
        await flushed(index)
        async with following(store) as (mirror, shown):
            await shown.wait_until(shows("w", blocks(*range(5000))))
            assert mirror.num_snapshots == 1


async def test_many_changes_travel_in_few_events(store: Store) -> None:
    async with writing(store) as index:
        await flushed(index)
        before = await store.redis.xlen(keys.index_events("tiny"))
        for number in range(2 * keys.MAX_EVENT_HASHES):
            index.publish(blocks(number))
        await flushed(index)
        assert await store.redis.xlen(keys.index_events("tiny")) - before <= 4


async def test_a_gap_in_the_stream_is_mended_by_a_snapshot(store: Store) -> None:
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown)
    async with writing(store) as index:
        await flushed(index)
        await mirror.catch_up()
        index.publish(blocks(1))
        await flushed(index)
        await lose_events(store)
        index.publish(blocks(2))
        await flushed(index)
        await mirror.catch_up()
        assert shown.blocks("w") == blocks(1, 2)


async def test_lost_last_events_are_noticed_without_later_ones(store: Store) -> None:
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown)
    async with writing(store) as index:
        index.publish(blocks(1))
        await flushed(index)
        await mirror.catch_up()
        index.evict(blocks(1))
        await flushed(index)
        await lose_events(store)
        await mirror.catch_up()
        assert shown.blocks("w") == set()


async def test_catching_up_without_news_costs_no_snapshot(store: Store) -> None:
    mirror = IndexMirror(store, "tiny", ObservedIndex())
    async with writing(store) as index:
        index.publish(blocks(1))
        await flushed(index)
        await mirror.catch_up()
        index.publish(blocks(2))
        await flushed(index)
        await mirror.catch_up()
        await mirror.catch_up()
        assert mirror.num_snapshots == 1


async def test_a_new_incarnation_replaces_the_blocks_of_the_earlier_one(store: Store) -> None:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(writing(store))
        _, shown = await stack.enter_async_context(following(store))
        old.publish(blocks(1, 2))
        await shown.wait_until(shows("w", blocks(1, 2)))
        new = await stack.enter_async_context(writing(store, incarnation="second"))
        new.publish(blocks(3))
        await shown.wait_until(shows("w", blocks(3)))


async def test_a_replaced_incarnation_falls_silent_and_cannot_remove_its_successor(store: Store) -> None:
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown)
    async with writing(store) as old:
        await flushed(old)
        async with writing(store, incarnation="second") as new:
            new.publish(blocks(3))
            await flushed(new)
            old.publish(blocks(1))
            async with asyncio.timeout(10):
                await old.replaced.wait()
            await old.stop()
            await mirror.catch_up()
            assert shown.blocks("w") == blocks(3)


async def test_stop_removes_the_worker_from_redis_and_from_mirrors(store: Store) -> None:
    async with following(store) as (_, shown):
        async with writing(store) as index:
            index.publish(blocks(1))
            await shown.wait_until(shows("w", blocks(1)))
        await shown.wait_until(lambda shown: "w" not in shown.workers())
    assert await stored_blocks(store) == set()
    assert await store.redis.hgetall(keys.index_writers("tiny")) == {}


async def test_a_dead_worker_leaves_when_its_lease_ends(store: Store) -> None:
    index = RedisIndex(store, "tiny", "w", "first", lease_s=0.6)
    index.publish(blocks(1))
    index.start()
    await flushed(index)
    async with following(store, audit_s=0.05) as (_, shown):
        await shown.wait_until(shows("w", blocks(1)))
        assert index.task is not None
        index.task.cancel()  # as a killed process would end
        await shown.wait_until(lambda shown: "w" not in shown.workers())
    assert await store.redis.keys("*:blk:*") == []


async def test_an_idle_writer_renews_its_lease(store: Store) -> None:
    async with writing(store, lease_s=0.6) as index, following(store, audit_s=0.05) as (_, shown):
        index.publish(blocks(1))
        await shown.wait_until(shows("w", blocks(1)))
        with pytest.raises(TimeoutError):
            await shown.wait_until(lambda shown: "w" not in shown.workers(), timeout_s=1.5)
        assert await stored_blocks(store) == blocks(1)


async def test_every_key_has_a_lifetime(store: Store) -> None:
    async with writing(store) as index:
        index.publish(blocks(1))
        await flushed(index)
        for key in await store.redis.keys("*"):
            assert 0 < await store.redis.pttl(key) <= LEASE_S * 1000
    for key in await store.redis.keys("*"):
        assert 0 < await store.redis.pttl(key) <= LEASE_S * 1000


async def test_the_stream_is_capped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_STREAM_EVENTS", 200)
    async with writing(store) as index:
        for number in range(600):
            index.publish(blocks(number))
            await flushed(index)
    assert await store.redis.xlen(keys.index_events("tiny")) <= 400


async def test_redis_coming_back_empty_is_filled_again_while_mirrors_keep_their_copy(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    held = blocks(*range(3000))
    async with (
        writing(mortal_store, lease_s=3.0) as index,
        following(mortal_store, audit_s=0.1) as (mirror, shown),
    ):
        index.publish(held)
        await shown.wait_until(shows("w", held))
        server.kill()
        index.publish(blocks(7000))
        index.evict(blocks(5))
        assert shown.blocks("w") == held
        server.start()
        await flushed(index)
        await shown.wait_until(shows("w", held - blocks(5) | blocks(7000)))
        assert await stored_blocks(mortal_store) == held - blocks(5) | blocks(7000)
        assert mirror.is_current


async def test_a_flushed_redis_is_filled_again_by_the_next_renewal(store: Store) -> None:
    async with writing(store, lease_s=0.6) as index, following(store, audit_s=0.05) as (_, shown):
        index.publish(blocks(1))
        await shown.wait_until(shows("w", blocks(1)))
        await store.redis.flushall()
        async with asyncio.timeout(10):
            while await stored_blocks(store) != blocks(1):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # only Redis knows when
        await shown.wait_until(shows("w", blocks(1)))


async def test_a_repeated_event_is_applied_once(store: Store) -> None:
    async with writing(store) as index:
        index.publish(blocks(1))
        await flushed(index)
        script_keys = [
            keys.index_writers("tiny"),
            keys.index_events("tiny"),
            keys.worker_blocks("tiny", "w", "first"),
        ]
        before = await store.redis.xlen(keys.index_events("tiny"))
        (block,) = blocks(2)
        sequence = (await store.run_script("index_writers", script_keys[:1]))[2] + 1
        args = ["w", "first", sequence, 0, 0, 30_000, 16, 100, b"", block, place_bytes(1), b"", b"", b"", b""]
        assert await store.run_script("index_apply", script_keys, args) == 1
        assert await store.run_script("index_apply", script_keys, args) == 1
        assert await store.redis.xlen(keys.index_events("tiny")) == before + 1


async def test_an_event_out_of_order_asks_for_a_new_start(store: Store) -> None:
    async with writing(store) as index:
        await flushed(index)
        script_keys = [
            keys.index_writers("tiny"),
            keys.index_events("tiny"),
            keys.worker_blocks("tiny", "w", "first"),
        ]
        (block,) = blocks(2)
        args = ["w", "first", 77, 0, 0, 30_000, 16, 100, b"", block, place_bytes(1), b"", b"", b"", b""]
        assert await store.run_script("index_apply", script_keys, args) == 0
        assert await stored_blocks(store) == set()


async def test_more_changes_than_blocks_while_redis_is_away_do_not_pile_up(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    async with writing(mortal_store) as index:
        await flushed(index)
        server.kill()
        for number in range(20 * keys.MAX_EVENT_HASHES):
            index.publish(blocks(number))
            index.evict(blocks(number))
        index.publish(blocks(1))
        assert index.num_pending <= 2 * keys.MAX_EVENT_HASHES
        server.start()
        await flushed(index)
        assert await stored_blocks(mortal_store) == blocks(1)


async def test_a_snapshot_taken_during_changes_ends_up_right(store: Store) -> None:
    async with writing(store) as index:
        index.publish(blocks(*range(20_000)))
        await flushed(index)
        shown = ObservedIndex()
        mirror = IndexMirror(store, "tiny", shown)

        async def change() -> None:
            for start in range(0, 20_000, 100):
                index.evict(blocks(*range(start, start + 60)))
                index.publish(blocks(*range(50_000 + start, 50_000 + start + 50)))
                await asyncio.sleep(0)
            await index.flush()

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(change())
            tasks.create_task(mirror.catch_up())
        await mirror.catch_up()
        assert shown.blocks("w") == await stored_blocks(store)
        assert len(shown.blocks("w")) == 18_000


async def test_a_mirror_keeps_blocks_of_a_writer_it_never_listed_only_for_as_long_as_it_lives(
    store: Store,
) -> None:
    shown = ObservedIndex()
    mirror = IndexMirror(store, "tiny", shown, monotonic=FakeClock().monotonic)
    await mirror.catch_up()
    async with writing(store) as index:
        index.publish(blocks(1))
        await flushed(index)
        await store.redis.hdel(keys.index_writers("tiny"), "w")  # ended before any listing showed it
        await mirror.catch_up()
        assert shown.blocks("w") == blocks(1)
        await mirror.catch_up()
        assert shown.workers() == {}


async def test_a_mirror_keeps_its_copy_while_redis_is_away_and_a_whole_lease_longer(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    clock = FakeClock()
    shown = ObservedIndex()
    mirror = IndexMirror(mortal_store, "tiny", shown, monotonic=clock.monotonic)
    dead = RedisIndex(mortal_store, "tiny", "w", "first", lease_s=LEASE_S)
    dead.publish(blocks(1))
    dead.start()
    await flushed(dead)
    await mirror.catch_up()
    assert dead.task is not None
    dead.task.cancel()
    server.kill()
    with pytest.raises(StoreUnavailable):
        await mirror.catch_up()
    assert not mirror.is_current
    clock.advance(1000.0)
    server.start()
    await mirror.catch_up()
    assert mirror.is_current
    assert shown.blocks("w") == blocks(1)
    clock.advance(LEASE_S)
    await mirror.catch_up()
    assert shown.workers() == {}


async def test_writer_and_mirror_go_on_by_themselves_after_an_outage(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    async with writing(mortal_store) as index, following(mortal_store) as (_, shown):
        index.publish(blocks(1))
        await shown.wait_until(shows("w", blocks(1)))
        server.kill()
        index.publish(blocks(2))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await index.flush()
        server.start()
        await shown.wait_until(shows("w", blocks(1, 2)))


async def test_stopping_while_redis_is_away_ends_at_once(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    async with writing(mortal_store) as index:
        await flushed(index)
        server.kill()
        async with asyncio.timeout(2):
            await index.stop()


async def test_the_garbage_collector_does_not_visit_what_a_writer_holds(store: Store) -> None:
    async with writing(store) as index:
        index.publish(blocks(*range(100)))
        index.publish(blocks(*range(50)), BlockTier.DISK)
        await flushed(index)
        assert not gc.is_tracked(index._held)
