"""This worker's entry in the registry: announced, renewed with its load, marked when draining, withdrawn.

Redis away is not an outage: the worker goes on serving and announces itself again when Redis is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from kvstore.registry import Registry, WorkerLoad, WorkerRecord
from kvstore.store import Backoff, StoreUnavailable
from servicekit.errors import WorkerLost
from servicekit.logging import get_logger

LEASE_S = 6.0
HEARTBEAT_S = 1.0

log = get_logger(__name__)


class Registration:
    def __init__(
        self,
        registry: Registry,
        record: WorkerRecord,
        load: Callable[[], WorkerLoad],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.is_announced = asyncio.Event()
        self._registry = registry
        self._record = record
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._has_changed = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. Raises WorkerLost when another process has taken over this worker id."""
        await self._announce()
        while True:
            await self._wait_for_heartbeat()
            record = replace(self._record, load=self._load())
            try:
                is_ours = await self._registry.renew(record)
            except StoreUnavailable as error:
                log.warning("registry_unavailable", reason=str(error))
                continue
            if not is_ours:
                raise WorkerLost(f"another process has taken over worker id {record.worker_id}")

    def start_draining(self) -> None:
        """Tell the routers at once."""
        self._record = replace(self._record, is_draining=True)
        self._has_changed.set()

    async def withdraw(self) -> None:
        try:
            await self._registry.withdraw(self._record.worker_id)
        except StoreUnavailable as error:
            log.warning("registry_unavailable", reason=str(error))  # the lease ends by itself

    async def _announce(self) -> None:
        backoff = Backoff()
        while not self.is_announced.is_set():
            try:
                await self._registry.announce(replace(self._record, load=self._load()), LEASE_S)
                self.is_announced.set()
            except StoreUnavailable as error:
                log.warning("registry_unavailable", reason=str(error))
                await asyncio.sleep(backoff.next_s())

    async def _wait_for_heartbeat(self) -> None:
        try:
            async with asyncio.timeout(self._heartbeat_s):
                await self._has_changed.wait()
        except TimeoutError:
            return
        self._has_changed.clear()
