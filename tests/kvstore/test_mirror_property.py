"""Whatever workers do and whatever is lost: once caught up, a mirror shows the blocks of the live workers."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import keys
from kvstore.block_hash import BlockHash
from kvstore.index_mirror import IndexMirror
from kvstore.prefix_index import MemoryIndex
from kvstore.redis_index import RedisIndex
from kvstore.store import Store
from servicekit.clock import FakeClock
from tests.fakes.redis_server import flush_all

LEASE_S = 60.0
WORKERS = st.sampled_from(["a", "b", "c"])
BLOCKS = st.sets(st.integers(0, 40), max_size=12)
ACTIONS = st.one_of(
    st.tuples(st.just("publish"), WORKERS, BLOCKS),
    st.tuples(st.just("evict"), WORKERS, BLOCKS),
    st.tuples(st.sampled_from(["restart", "stop", "kill"]), WORKERS, st.just(set())),
    st.tuples(
        st.sampled_from(["lose events", "lose everything", "catch up", "settle"]), st.just(""), st.just(set())
    ),
)


@dataclass
class Cluster:
    store: Store
    model: str
    clock: FakeClock = field(default_factory=FakeClock)
    writers: dict[str, RedisIndex] = field(default_factory=dict)
    held: dict[str, set[BlockHash]] = field(default_factory=dict)
    incarnations: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.shown = [MemoryIndex(), MemoryIndex()]
        self.mirrors = [
            IndexMirror(self.store, self.model, index, monotonic=self.clock.monotonic) for index in self.shown
        ]

    async def act(self, verb: str, worker_id: str, numbers: set[int]) -> None:
        hashes = {BlockHash(number.to_bytes(16, "little")) for number in numbers}
        if verb in ("publish", "evict") and worker_id not in self.writers:
            self.start(worker_id)
        match verb:
            case "publish":
                self.writers[worker_id].publish(hashes)
                self.held[worker_id] |= hashes
            case "evict":
                self.writers[worker_id].evict(hashes)
                self.held[worker_id] -= hashes
            case "restart":
                await self.kill(worker_id)
                self.start(worker_id)
            case "stop" if worker_id in self.writers:
                del self.held[worker_id]
                await self.writers.pop(worker_id).stop()
            case "kill":
                await self.kill(worker_id)
                await self.end_lease(worker_id)
            case "settle":
                await self.settle()
            case _:
                await self.disturb(verb)

    async def disturb(self, verb: str) -> None:
        match verb:
            case "lose events":
                await self.store.redis.xtrim(keys.index_events(self.model), maxlen=0, approximate=False)
            case "lose everything":
                await self.store.redis.flushall()
            case "catch up":
                await self.mirrors[0].catch_up()

    def start(self, worker_id: str) -> None:
        incarnation = str(next(self.incarnations))
        writer = RedisIndex(self.store, self.model, worker_id, incarnation, lease_s=LEASE_S)
        writer.start()
        self.writers[worker_id], self.held[worker_id] = writer, set()

    async def kill(self, worker_id: str) -> None:
        """As SIGKILL would: nothing is said to Redis."""
        self.held.pop(worker_id, None)
        writer = self.writers.pop(worker_id, None)
        if writer is not None and writer.task is not None:
            writer.task.cancel()
            await asyncio.gather(writer.task, return_exceptions=True)

    async def end_lease(self, worker_id: str) -> None:
        """What time does in Redis, in an instant."""
        await self.store.redis.hdel(keys.index_writers(self.model), worker_id)

    async def settle(self) -> None:
        for writer in self.writers.values():
            async with asyncio.timeout(10):
                await writer.flush()

    async def close(self) -> None:
        for worker_id in list(self.writers):
            await self.kill(worker_id)


async def play(url: str, actions: list[tuple[str, str, set[int]]]) -> None:
    flush_all(url)
    store = Store(url)
    cluster = Cluster(store, "tiny")
    try:
        for action in actions:
            await cluster.act(*action)
        await cluster.settle()
        for worker_id in {"a", "b", "c"} - cluster.writers.keys():
            await cluster.end_lease(worker_id)  # again: the last words of a killed writer may have come after
        for mirror in cluster.mirrors:
            await mirror.catch_up()
        cluster.clock.advance(LEASE_S)  # leases of the dead run out for readers too
        for mirror in cluster.mirrors:
            await mirror.catch_up()
        for shown in cluster.shown:
            assert {worker_id: set(shown.blocks(worker_id)) for worker_id in shown.workers()} == cluster.held
    finally:
        await cluster.close()
        await store.close()


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=st.lists(ACTIONS, max_size=25))
def test_mirrors_equal_the_blocks_of_live_workers_whatever_was_lost(
    shared_redis_url: str, actions: list[tuple[str, str, set[int]]]
) -> None:
    asyncio.run(play(shared_redis_url, actions))
