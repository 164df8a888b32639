"""Real Redis-compatible servers for tests, and what they lack: a password, TLS, observation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import redis

from kvstore.block_hash import BlockTier
from kvstore.embedded import EmbeddedServer
from kvstore.memory_index import MemoryIndex
from kvstore.registry import WorkerRecord


@contextmanager
def redis_server() -> Iterator[tuple[EmbeddedServer, str]]:
    """A server and its URL. Its kill() and start() make a crash and an empty return at the same URL."""
    server = EmbeddedServer()
    url = server.start()
    try:
        yield server, url
    finally:
        server.stop()


def flush_all(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


def worker_record(worker_id: str = "decode-0", incarnation: str = "first", **values: object) -> WorkerRecord:
    defaults: dict[str, object] = {
        "role": "decode",
        "model": "tiny",
        "address": "127.0.0.1:7001",
        "metrics_address": "127.0.0.1:7002",
        "group_id": "group-0",
        "ep_rank": 0,
        "ep_size": 1,
        "model_fingerprint": "model",
        "layout_fingerprint": "layout",
        "block_size": 16,
        "max_model_len": 4096,
        "num_blocks": 256,
        "host_id": "host",
    }
    return WorkerRecord(worker_id=worker_id, incarnation=incarnation, **(defaults | values))  # type: ignore[arg-type]


class ObservedIndex(MemoryIndex):
    """Wakes those who wait for it to change."""

    def __init__(self, max_blocks: int = 1_000_000) -> None:
        super().__init__(max_blocks)
        self._changed = asyncio.Event()

    def publish(self, worker_id, hashes, tier=BlockTier.DEVICE):  # type: ignore[no-untyped-def]
        super().publish(worker_id, hashes, tier)
        self._changed.set()

    def evict(self, worker_id, hashes):  # type: ignore[no-untyped-def]
        super().evict(worker_id, hashes)
        self._changed.set()

    def drop(self, worker_id: str) -> None:
        super().drop(worker_id)
        self._changed.set()

    async def wait_until(self, is_reached: Callable[[ObservedIndex], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not is_reached(self):
                self._changed.clear()
                await self._changed.wait()
