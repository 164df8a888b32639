"""The registry of one process: for tests, under the same contract as RedisRegistry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from kvstore.registry import Workers
from kvstore.worker_record import WorkerRecord


class MemoryRegistry:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic, *, relist_s: float = 1.0) -> None:
        self._monotonic = monotonic
        self._relist_s = relist_s
        self._held: dict[str, tuple[WorkerRecord, float]] = {}  # worker id -> record, end of its lease
        self._announced: dict[str, float] = {}  # worker id -> lease_s
        self._changed = asyncio.Condition()

    async def announce(self, record: WorkerRecord, lease_s: float) -> None:
        self._announced[record.worker_id] = lease_s
        await self._hold(record)

    async def renew(self, record: WorkerRecord) -> bool:
        assert record.worker_id in self._announced, f"{record.worker_id} was not announced"
        self._forget_ended()
        held = self._held.get(record.worker_id)
        if held and held[0].incarnation != record.incarnation:
            return False
        await self._hold(record)
        return True

    async def withdraw(self, worker_id: str) -> None:
        self._held.pop(worker_id, None)
        async with self._changed:
            self._changed.notify_all()

    async def list(self) -> Workers:
        self._forget_ended()
        return [self._held[worker_id][0] for worker_id in sorted(self._held)]

    async def watch(self) -> AsyncIterator[Workers]:
        shown: Workers | None = None
        while True:
            workers = await self.list()
            if workers != shown:
                shown = workers
                yield workers
                continue  # it may have changed while the reader was busy
            try:
                async with asyncio.timeout(self._relist_s), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _hold(self, record: WorkerRecord) -> None:
        ends_at = self._monotonic() + self._announced[record.worker_id]
        self._held[record.worker_id] = (record, ends_at)
        async with self._changed:
            self._changed.notify_all()

    def _forget_ended(self) -> None:
        now = self._monotonic()
        self._held = {key: held for key, held in self._held.items() if held[1] > now}
