"""The writing side of the prefix index: one worker tells Redis which blocks it holds.

The life of a change:
1. publish() / evict() on the event loop: noted in `_held` (the truth) and `_pending` (what Redis lacks). No
   waiting.
2. The writer task takes what is pending as one numbered event and applies it in one script: the worker's
   blocks, its sequence number, its lease, and the event stream that mirrors follow. While it waits
   for the answer the next changes gather.
3. The answer was lost: the same event is sent again; the script knows its number.
4. Redis does not know this writer (came back empty, lease ran out) or too much is pending: everything that
   is held is sent again, beginning with a reset.
5. Another incarnation of the worker has taken over: this one falls silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore import keys
from kvstore.block_hash import HASH_SIZE_BYTES, BlockHash, BlockTier
from kvstore.block_order import place_bytes
from kvstore.store import Outage, Store, StoreUnavailable

log = logging.getLogger(__name__)

_START_OVER, _REPLACED = 0, -1
_TIERS = tuple(BlockTier)


@dataclass(frozen=True, slots=True)
class _Event:
    sequence: int
    placed: tuple[bytes, ...] = (b"", b"") * len(BlockTier)  # by tier: joined hashes, their joined places
    removed: bytes = b""
    is_reset: bool = False


class RedisIndex:
    """Owns the blocks of one incarnation of one worker in Redis, from start() to stop()."""

    def __init__(
        self, store: Store, model: str, worker_id: str, incarnation: str, *, lease_s: float = 10.0
    ) -> None:
        """`incarnation`: no white space; the one of the worker's record in the registry."""
        assert incarnation and not any(map(str.isspace, incarnation))
        self._store = store
        self._keys = [
            keys.index_writers(model),
            keys.index_events(model),
            keys.worker_blocks(model, worker_id, incarnation),
        ]
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._lease_s = lease_s
        # place (block_order.py) * number of tiers + tier: integers, which no garbage collection visits
        self._held: dict[BlockHash, int] = {}
        self._last_place = 0
        self._pending: dict[BlockHash, BlockTier | None] = {}  # None: removed
        self._sequence = 0  # of the last event made; never used twice
        self._unanswered: _Event | None = None
        self._starts_over = True
        self._has_started = False
        self._changed = asyncio.Event()
        self._flushes: list[asyncio.Future[None]] = []  # each asked for before the next round
        self.task: asyncio.Task[None] | None = None  # ends by itself only when replaced
        self.replaced = asyncio.Event()  # another incarnation of this worker has taken over

    @property
    def num_pending(self) -> int:
        """Changes that Redis lacks."""
        return len(self._pending)

    def start(self) -> None:
        """Write from now on; earlier calls of publish() and evict() count."""
        self._changed.set()
        self.task = asyncio.create_task(self._run(), name="prefix-index-writer")

    async def stop(self) -> None:
        """Take the worker's blocks out of the index. Redis away: they leave with the lease."""
        if self.task is None:
            return
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.task = None
        args = [self._worker_id, self._incarnation, keys.MAX_STREAM_EVENTS]
        try:
            await self._store.run_script("index_withdraw", self._keys, args)
        except StoreUnavailable as error:
            log.warning("prefix_index_not_withdrawn", extra={"fields": {"reason": str(error)}})

    def publish(self, hashes: Iterable[BlockHash], tier: BlockTier = BlockTier.DEVICE) -> None:
        """The worker holds these blocks now, and `tier` is the fastest where it has them."""
        for block_hash in hashes:
            held = self._held.get(block_hash)
            if held is None:
                self._last_place += 1
                place = self._last_place
            else:
                place, now = divmod(held, len(_TIERS))
                if now == tier:
                    continue
            self._held[block_hash] = place * len(_TIERS) + tier
            self._pending[block_hash] = tier
        self._changes_noted()

    def evict(self, hashes: Iterable[BlockHash]) -> None:
        """The worker holds these blocks no longer, in no tier."""
        for block_hash in hashes:
            if self._held.pop(block_hash, None) is not None:
                self._pending[block_hash] = None
        self._changes_noted()

    async def flush(self) -> None:
        """Return once Redis has confirmed everything noted so far.

        Waits as long as Redis is away, and for ever when replaced: use a timeout.
        """
        confirmed = asyncio.get_running_loop().create_future()
        self._flushes.append(confirmed)
        self._changed.set()
        await confirmed

    def _changes_noted(self) -> None:
        if len(self._pending) > len(self._held) + keys.MAX_EVENT_HASHES:
            self._start_over()
        if self._pending or self._starts_over:
            self._changed.set()

    def _start_over(self) -> None:
        self._starts_over = True
        self._unanswered = None
        self._pending.clear()

    async def _run(self) -> None:
        outage = Outage("prefix_index_writer")
        while not self.replaced.is_set():
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    await self._changed.wait()
            except TimeoutError:
                pass  # time to renew the lease
            self._changed.clear()
            num_flushes = len(self._flushes)
            try:
                await self._bring_up_to_date()
                outage.end()
                if not self.replaced.is_set():
                    self._confirm(num_flushes)
            except StoreUnavailable as error:
                self._changed.set()
                await asyncio.sleep(outage.go_on(error))
        log.error("prefix_index_writer_replaced", extra={"fields": {"worker_id": self._worker_id}})

    async def _bring_up_to_date(self) -> None:
        while not self.replaced.is_set():
            event = self._next_event()
            await self._apply(event)
            if not self._pending and not self._starts_over:
                return

    def _confirm(self, num_flushes: int) -> None:
        for confirmed in self._flushes[:num_flushes]:
            if not confirmed.done():
                confirmed.set_result(None)
        del self._flushes[:num_flushes]

    def _next_event(self) -> _Event:
        """The unanswered one again, or a new one; without changes one that only renews the lease."""
        if self._unanswered is not None:
            return self._unanswered
        if self._starts_over:
            self._starts_over = False
            self._pending = {
                block_hash: _TIERS[held % len(_TIERS)] for block_hash, held in self._held.items()
            }
            self._sequence += 1
            self._unanswered = _Event(self._sequence, is_reset=True)
            return self._unanswered
        if self._pending:
            num_changes = min(len(self._pending), keys.MAX_EVENT_HASHES)
            # From the end, where taking costs nothing.
            batch = [self._pending.popitem() for _ in range(num_changes)]
            self._sequence += 1
            placed: list[bytes] = []
            for tier in BlockTier:
                placed += self._in_order(block_hash for block_hash, now in batch if now is tier)
            removed = b"".join(block_hash for block_hash, now in batch if now is None)
            self._unanswered = _Event(self._sequence, tuple(placed), removed)
            return self._unanswered
        return _Event(self._sequence)

    def _in_order(self, hashes: Iterable[BlockHash]) -> tuple[bytes, bytes]:
        """As prompts will follow these blocks: joined hashes and joined places."""
        held = self._held
        ordered = sorted(hashes, key=held.__getitem__)
        return b"".join(ordered), b"".join(place_bytes(held[h] // len(_TIERS)) for h in ordered)

    async def _apply(self, event: _Event) -> None:
        takes_over = event.is_reset and not self._has_started
        args = [
            self._worker_id,
            self._incarnation,
            event.sequence,
            int(event.is_reset),
            int(takes_over),
            round(self._lease_s * 1000),
            HASH_SIZE_BYTES,
            keys.MAX_STREAM_EVENTS,
            event.removed,
            *event.placed,
        ]
        result = await self._store.run_script("index_apply", self._keys, args)
        if result == _REPLACED:
            self.replaced.set()
        elif result == _START_OVER:
            self._start_over()
        else:
            self._has_started = True
            if self._unanswered is event:  # not thrown away by _start_over() while the answer was on its way
                self._unanswered = None
