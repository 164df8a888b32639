"""Blocks go to the lower tiers as soon as they are full, so that eviction costs nothing.

A full block never changes, so copying it early takes nothing from anybody, and whoever needs its place on the
device gets it at once. Nobody waits for a copy and no copy holds a block: one whose block was evicted
meanwhile (its generation is another one) is thrown away. What is on the way and evicted is lost, which costs
a later computation and nothing else.

Device -> host: one batch at a time. Host -> disk: one batch at a time, from host memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from engine.tiers.background_threads import BackgroundThreads
from engine.tiers.block_copy import BlockCopy
from engine.tiers.block_key import BlockKey
from engine.tiers.block_places import BlockPlaces

_BATCH_BYTES = 4 << 20
_MAX_BATCH = 64  # blocks


class _Copy(NamedTuple):
    key: BlockKey
    block_id: int
    generation: int
    slot: int


class WriteBehind:
    """Belongs to the engine thread."""

    def __init__(
        self,
        places: BlockPlaces,
        copy: BlockCopy,
        on_change: Callable[[], None],
        *,
        is_staging: bool,
    ) -> None:
        """is_staging: host memory is only the way to the disk, and holds what is not there yet."""
        assert places.host is not None
        self.num_lost = 0  # blocks that went before they were saved, or could not be
        self._places = places
        self._host = places.host
        self._disk = places.disk
        self._copy = copy
        self._is_staging = is_staging
        self._max_pending = 2 * places.pool.num_blocks
        self._batch = min(_MAX_BATCH, max(1, _BATCH_BYTES // self._host.blocks.layout.block_bytes))
        self._pending: OrderedDict[BlockKey, int] = OrderedDict()  # block ids
        self._for_disk: OrderedDict[BlockKey, None] = OrderedDict()
        self._copying = BackgroundThreads("kv-save", on_change)
        self._writing = BackgroundThreads("kv-write", on_change)

    @property
    def is_idle(self) -> bool:
        """Everything that was offered is saved, or lost."""
        return not (self._pending or self._for_disk or self._copying.num_open or self._writing.num_open)

    def offer(self, block_id: int, key: BlockKey) -> None:
        """A block of the device is full and registered."""
        if self._is_there(key) or key in self._pending:
            return
        if len(self._pending) >= self._max_pending:
            self.num_lost += 1
            return
        self._pending[key] = block_id

    def poll(self) -> None:
        """Follows up what the threads have done, and gives them the next."""
        self._copying.poll()
        self._writing.poll()
        self.pump()

    def pump(self) -> None:
        if self._disk is not None and not self._writing.num_open:
            self._start_write()
        if self._pending and not self._copying.num_open:
            self._start_copy()

    def close(self) -> None:
        self._copying.close()
        self._writing.close()

    def _start_copy(self) -> None:
        pool = self._places.pool
        batch: list[_Copy] = []
        while self._pending and len(batch) < self._batch and self._may_fill_host:
            key, block_id = self._pending.popitem(last=False)
            if pool.block_of(key.block_hash) != block_id:
                self.num_lost += 1
            elif not self._is_there(key):  # it may have been offered again while it was on the way
                slot = self._host.reserve(key)
                if slot is None:
                    self.num_lost += 1
                else:
                    batch.append(_Copy(key, block_id, pool.generation(block_id), slot))
        if not batch:
            return
        ready = self._copy.mark()

        def copy() -> list[bool]:
            self._copy.save([c.block_id for c in batch], [c.slot for c in batch], ready)
            # Evicted later than this, a block was still what it was when it was copied.
            return [pool.generation(c.block_id) == c.generation for c in batch]

        self._copying.submit(copy, lambda future: self._copied(batch, future))

    def _copied(self, batch: list[_Copy], future: Future[list[bool]]) -> None:
        for copied, is_good in zip(batch, future.result(), strict=True):
            if not is_good:
                self._host.cancel(copied.slot)
                self.num_lost += 1
                continue
            self._places.commit_to_host(copied.key, copied.slot)
            if self._disk is not None and not self._is_on_disk(copied.key):
                self._for_disk[copied.key] = None
            else:
                self._passed(copied.key)

    @property
    def _may_fill_host(self) -> bool:
        return not self._is_staging or self._host.num_free > 0

    def _is_there(self, key: BlockKey) -> bool:
        """Where it is to be kept, or on the way from host memory to there."""
        return key.block_hash in self._host or (self._is_staging and self._is_on_disk(key))

    def _is_on_disk(self, key: BlockKey) -> bool:
        return self._disk is not None and key.block_hash in self._disk

    def _start_write(self) -> None:
        """Removals too: they make the room for what is written behind them."""
        assert self._disk is not None
        batch: list[tuple[BlockKey, int]] = []
        while self._for_disk and len(batch) < self._batch:
            key, _ = self._for_disk.popitem(last=False)
            if key.block_hash not in self._host or not self._is_connected(key) or not self._disk.reserve(key):
                self.num_lost += not self._is_on_disk(key)
                self._passed(key)
                continue
            batch.append((key, self._host.pin(key.block_hash)))
        removals = self._disk.take_removals()
        if not batch and not removals:
            return

        def write() -> list[bool]:
            for path in removals:
                path.unlink(missing_ok=True)
            return [self._write(key, slot) for key, slot in batch]

        self._writing.submit(write, lambda future: self._written(batch, future))

    def _passed(self, key: BlockKey) -> None:
        """Nothing more happens to this block on its way to the disk."""
        if self._is_staging:
            self._host.discard(key.block_hash)

    def _is_connected(self, key: BlockKey) -> bool:
        """Without the blocks before it a block on disk is of no use."""
        assert self._disk is not None
        return key.depth == 0 or self._disk.has_or_gets(key.parent)

    def _write(self, key: BlockKey, slot: int) -> bool:
        assert self._disk is not None
        try:
            blocks = self._host.blocks
            self._disk.directory.write(key, blocks.read_blocks(0, blocks.layout.num_layers, [slot]))
        except OSError:
            return False  # the disk is full, or broken: a block that is not there is only slower
        return True

    def _written(self, batch: list[tuple[BlockKey, int]], future: Future[list[bool]]) -> None:
        assert self._disk is not None
        for (key, _), is_there in zip(batch, future.result(), strict=True):
            self._host.unpin(key.block_hash)
            if is_there:
                self._places.commit_to_disk(key)
            else:
                self._disk.cancel(key)
                self.num_lost += 1
            self._passed(key)
