"""Cached blocks that somebody outside the engine reads: until unpinned they keep their place and content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.kv_cache import KvCache
from kvstore.block_hash import BlockHash


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedRun:
    """Leading blocks that are here. Readable from any thread until Engine.unpin(pin_id)."""

    pin_id: int  # never used again
    block_ids: tuple[int, ...]
    kv_cache: KvCache

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    def read_blocks(self, start: int, stop: int) -> memoryview:
        """A copy of blocks [start, stop) of the run, [layer][block][token in block][token_shape]."""
        layout = self.kv_cache.layout
        return self.kv_cache.read_blocks(0, layout.num_layers, list(self.block_ids[start:stop]))

    def is_on_device(self, start: int, stop: int) -> list[int] | None:
        """Block ids of blocks [start, stop) of the run in the KV cache; None when they are elsewhere."""
        return list(self.block_ids[start:stop])


class Pins:
    def __init__(self, pool: BlockPool, kv_cache: KvCache) -> None:
        self._pool = pool
        self._kv_cache = kv_cache
        self._runs: dict[int, PinnedRun] = {}
        self._ids = itertools.count(1)

    def pin(self, hashes: list[BlockHash]) -> PinnedRun:
        """The longest leading run of these blocks that is here, maybe none."""
        block_ids = self._pool.lookup(hashes)
        self._pool.acquire(block_ids)
        run = PinnedRun(pin_id=next(self._ids), block_ids=tuple(block_ids), kv_cache=self._kv_cache)
        self._runs[run.pin_id] = run
        return run

    def unpin(self, pin_id: int) -> bool:
        """Idempotent; whether blocks came back."""
        run = self._runs.pop(pin_id, None)
        if run is None:
            return False
        self._pool.release(run.block_ids)
        return bool(run.block_ids)

    def block_ids(self) -> Iterator[int]:
        """Of every pin, as often as it is pinned."""
        for run in self._runs.values():
            yield from run.block_ids
