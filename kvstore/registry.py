"""Which workers are alive, where they are and how loaded.

The life of a worker here:
1. announce(): the record appears, readers are told, a lease runs on the server's clock.
2. renew() well before the lease ends (a third of it is usual): new load, longer lease. Redis was away or came
   back empty: the next renewal that gets through announces again.
3. withdraw(), or the lease ends: the record goes.
A restart with the same worker id takes over; the earlier incarnation's renewals are then refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

from redis.asyncio.client import PubSub

from kvstore import keys
from kvstore.leases import Leased, LeaseView
from kvstore.store import MAX_BLOCK_S, Outage, Store, StoreUnavailable
from kvstore.worker_record import WorkerLoad, WorkerRecord, WorkerRole

__all__ = ["RedisRegistry", "Registry", "WorkerLoad", "WorkerRecord", "WorkerRole"]

Workers = list[WorkerRecord]
Listing = list[Leased[WorkerRecord]]


class Registry(Protocol):
    """Of one model. Every method but watch() raises StoreUnavailable when Redis is away."""

    async def announce(self, record: WorkerRecord, lease_s: float) -> None: ...

    async def renew(self, record: WorkerRecord) -> bool:
        """False: another incarnation of this worker id has taken over, so this process should end.

        The lease lasts as announced. AssertionError when this registry object has not announced the worker.
        """
        ...

    async def withdraw(self, worker_id: str) -> None:
        """Idempotent. A worker announced by this object is withdrawn only in its own incarnation."""
        ...

    async def list(self) -> Workers:
        """Live workers by worker id."""
        ...

    def watch(self) -> AsyncIterator[Workers]:
        """The live workers now, then again after every change, for ever.

        Arrivals, withdrawals and draining show at once, load and ended leases within the relist interval.
        While Redis is away nothing is yielded and nobody is dropped (LeaseView).
        """
        ...


class RedisRegistry:
    def __init__(self, store: Store, model: str, *, relist_s: float = 1.0) -> None:
        self._store = store
        self._keys = [keys.workers(model), keys.worker_leases(model), keys.worker_changes(model)]
        self._relist_s = relist_s
        self._announced: dict[str, tuple[WorkerRecord, float]] = {}  # worker id -> last record, lease_s

    async def announce(self, record: WorkerRecord, lease_s: float) -> None:
        self._announced[record.worker_id] = (record, lease_s)
        await self._write(record, lease_s, takes_over=True, tells_readers=True)

    async def renew(self, record: WorkerRecord) -> bool:
        assert record.worker_id in self._announced, f"{record.worker_id} was not announced"
        last, lease_s = self._announced[record.worker_id]
        # Load changes all the time: readers fetch it when they list again.
        tells_readers = dataclasses.replace(last, load=record.load) != record
        is_ours = await self._write(record, lease_s, takes_over=False, tells_readers=tells_readers)
        self._announced[record.worker_id] = (record, lease_s)
        return is_ours

    async def withdraw(self, worker_id: str) -> None:
        announced = self._announced.pop(worker_id, None)
        incarnation = announced[0].incarnation if announced else ""
        await self._store.run_script("registry_withdraw", self._keys, [worker_id, incarnation])

    async def list(self) -> Workers:
        return _sorted({leased.key: leased.value for leased in await self._listing()})

    async def watch(self) -> AsyncIterator[Workers]:
        view = LeaseView[WorkerRecord](time.monotonic)
        outage = Outage("registry_watch")
        shown: Workers | None = None
        while True:
            try:
                async with aclosing(self._changes(view)) as changes:
                    async for _ in changes:
                        outage.end()
                        workers = _sorted(view.values())
                        if workers != shown:
                            shown = workers
                            yield workers
            except StoreUnavailable as error:
                view.store_lost()
                await asyncio.sleep(outage.go_on(error))

    async def _changes(self, view: LeaseView[WorkerRecord]) -> AsyncGenerator[None, None]:
        """Brings `view` up to date and yields, until Redis is lost."""
        pubsub = self._store.pubsub()
        try:
            async with self._store.exchange():
                await pubsub.subscribe(self._keys[2])
            while True:
                view.update(await self._listing())
                yield
                await self._wait_for_change(pubsub, view)
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _wait_for_change(self, pubsub: PubSub, view: LeaseView[WorkerRecord]) -> None:
        """Return on a change, when a lease may have ended, or after relist_s."""
        timeout_s = min(self._relist_s, MAX_BLOCK_S)
        next_end_s = view.next_end_s()
        if next_end_s is not None:
            timeout_s = min(timeout_s, next_end_s + 0.001)
        async with self._store.exchange():
            # The confirmation of the subscription is not a change: it reads as None and means list again.
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        while message is not None:
            verb, _, worker_id = message["data"].decode().partition(" ")
            if verb == "withdrawn":
                view.withdraw(worker_id)
            async with self._store.exchange():
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0)

    async def _write(
        self, record: WorkerRecord, lease_s: float, *, takes_over: bool, tells_readers: bool
    ) -> bool:
        flags = [int(takes_over), int(tells_readers)]
        args = [record.worker_id, record.incarnation, record.to_json(), round(lease_s * 1000), *flags]
        return bool(await self._store.run_script("registry_announce", self._keys, args))

    async def _listing(self) -> Listing:
        flat = await self._store.run_script("registry_list", self._keys[:2])
        records = [WorkerRecord.from_json(text) for text in flat[::2]]
        return [
            Leased(record.worker_id, record, remaining_ms / 1000)
            for record, remaining_ms in zip(records, flat[1::2], strict=True)
        ]


def _sorted(workers: dict[str, WorkerRecord]) -> Workers:
    return [workers[worker_id] for worker_id in sorted(workers)]
