"""The reading side of the prefix index: a router's own copy, in a MemoryIndex.

1. Note where the event stream ends, list the live writers, take a snapshot of each: its blocks,
   scanned piece by piece, put in order and shown when complete. Changes made meanwhile come again as events;
   repeating them in order gives the right sets.
2. Follow the stream. Each writer numbers its events: a number too high, or an incarnation that is not
   known, means that something was lost, so that writer's snapshot is taken again.
3. Every audit_s list the writers: one whose number is ahead of what the stream brought gets a snapshot (its
   last events were lost), one whose lease has ended is dropped.
4. Redis away: the copy stays as it is. Redis back: from 1, keeping what is still right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from kvstore import keys
from kvstore.block_hash import HASH_SIZE_BYTES, BlockHash, BlockTier
from kvstore.block_order import ScannedBlocks
from kvstore.leases import Leased, LeaseView
from kvstore.memory_index import MemoryIndex
from kvstore.store import MAX_BLOCK_S, Outage, Store, StoreUnavailable

log = logging.getLogger(__name__)

_EVENTS_PER_READ = 16
_HASHES_PER_SCAN = 1000

StreamEvents = list[tuple[bytes, dict[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class _Position:
    """How far a writer has come."""

    incarnation: str
    sequence: int


class IndexMirror:
    """The only writer of `index`. Owns no task: the caller runs and cancels run()."""

    def __init__(
        self,
        store: Store,
        model: str,
        index: MemoryIndex,
        *,
        audit_s: float = 2.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._model = model
        self._index = index
        self._audit_s = audit_s
        self._events_key = keys.index_events(model)
        self._last_event_id: bytes | None = None  # None: not following
        self._reached: dict[str, _Position] = {}  # worker id -> what `index` shows
        self._writers = LeaseView[_Position](monotonic)
        self._is_full = False
        self.num_snapshots = 0

    @property
    def is_current(self) -> bool:
        """Following the stream, so at most audit_s behind."""
        return self._last_event_id is not None

    async def run(self) -> None:
        """Follow until cancelled."""
        outage = Outage("prefix_index_mirror")
        while True:
            try:
                await self.catch_up()
                outage.end()
                await self._follow_until(time.monotonic() + self._audit_s)
            except StoreUnavailable as error:
                await asyncio.sleep(outage.go_on(error))

    async def catch_up(self) -> None:
        """Make the copy what Redis knows now. Raises StoreUnavailable."""
        try:
            if self._last_event_id is None:
                self._last_event_id = await self._end_of_stream()
            await self._audit()
        except StoreUnavailable:
            self._lose_store()
            raise

    async def _follow_until(self, deadline: float) -> None:
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                await self._read_events(min(left_s, MAX_BLOCK_S))
        except StoreUnavailable:
            self._lose_store()
            raise

    def _lose_store(self) -> None:
        self._last_event_id = None
        self._writers.store_lost()

    async def _end_of_stream(self) -> bytes:
        async with self._store.exchange():
            last = cast(StreamEvents, await self._store.redis.xrevrange(self._events_key, count=1))
        return last[0][0] if last else b"0-0"

    async def _read_events(self, block_s: float | None) -> bool:
        """Apply the next events, waiting up to `block_s` for the first. False: there were none."""
        assert self._last_event_id is not None
        block_ms = None if block_s is None else max(1, round(block_s * 1000))
        async with self._store.exchange():
            streams: Any = await self._store.redis.xread(
                {self._events_key: self._last_event_id}, count=_EVENTS_PER_READ, block=block_ms
            )
        if not streams:
            return False
        for event_id, fields in cast(StreamEvents, streams[0][1]):
            self._last_event_id = event_id
            await self._apply(fields)
            await asyncio.sleep(0)  # requests come first
        await self._sweep()
        return True

    async def _audit(self) -> None:
        known = set(self._reached)
        listing = await self._list_writers()
        # Whatever the listing knows was in the stream before it, so that an empty stream proves a loss.
        while await self._read_events(block_s=None):
            pass
        self._writers.update(listing)
        for worker_id in known - self._writers.values().keys():
            self._drop(worker_id)
        for leased in listing:
            reached = self._reached.get(leased.key)
            is_same = reached is not None and reached.incarnation == leased.value.incarnation
            if reached is None or not is_same or reached.sequence < leased.value.sequence:
                await self._take_snapshot(leased.key)
        await self._sweep()
        if self._index.num_refused and not self._is_full:
            self._is_full = True
            log.warning("prefix_index_full", extra={"fields": {"num_blocks": self._index.num_blocks}})

    async def _apply(self, fields: dict[bytes, bytes]) -> None:
        worker_id, incarnation = fields[b"w"].decode(), fields[b"i"].decode()
        reached = self._reached.get(worker_id)
        is_same = reached is not None and reached.incarnation == incarnation
        if b"d" in fields:
            if is_same:
                self._writers.withdraw(worker_id)
                self._drop(worker_id)
            return
        sequence = int(fields[b"n"])
        if is_same and reached is not None and sequence <= reached.sequence:
            return  # part of the snapshot
        is_reset = fields[b"r"] == b"1"
        is_next = is_same and reached is not None and sequence == reached.sequence + 1
        if not is_reset and not is_next:
            await self._take_snapshot(worker_id)
            return
        if is_reset:
            self._index.drop(worker_id)
        self._index.evict(worker_id, _split(fields[b"x"]))
        for tier in BlockTier:
            self._index.publish(worker_id, _split(fields[b"%d" % tier]), tier)
        self._reached[worker_id] = _Position(incarnation, sequence)

    async def _take_snapshot(self, worker_id: str) -> None:
        listing = {leased.key: leased.value for leased in await self._list_writers()}
        position = listing.get(worker_id)
        if position is None or position == self._reached.get(worker_id):
            return
        scanned = await self._scan(keys.worker_blocks(self._model, worker_id, position.incarnation))
        replacement = self._index.replace(worker_id)
        try:
            for batch in scanned.batches():
                for tier, hashes in batch:
                    replacement.publish(hashes, tier)
                await asyncio.sleep(0)  # requests come first
            replacement.show()
            self._reached[worker_id] = position
            self.num_snapshots += 1
        finally:
            replacement.discard()

    async def _scan(self, key: str) -> ScannedBlocks:
        scanned, cursor = ScannedBlocks(), cast(Any, None)
        while cursor is None or int(cursor):
            async with self._store.exchange():
                cursor, found = await self._store.redis.hscan(key, cursor or 0, count=_HASHES_PER_SCAN)
            scanned.add(cast(dict[BlockHash, bytes], found))
        return scanned

    def _drop(self, worker_id: str) -> None:
        self._reached.pop(worker_id, None)
        self._index.drop(worker_id)

    async def _sweep(self) -> None:
        while self._index.sweep():  # noqa: ASYNC110
            await asyncio.sleep(0)  # not waiting: requests come first

    async def _list_writers(self) -> list[Leased[_Position]]:
        flat = await self._store.run_script("index_writers", [keys.index_writers(self._model)])
        rows = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
        return [
            Leased(worker_id.decode(), _Position(incarnation.decode(), sequence), remaining_ms / 1000)
            for worker_id, incarnation, sequence, remaining_ms in rows
        ]


def _split(hashes: bytes) -> list[BlockHash]:
    return [BlockHash(hashes[i : i + HASH_SIZE_BYTES]) for i in range(0, len(hashes), HASH_SIZE_BYTES)]
