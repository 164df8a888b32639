"""Cached blocks that somebody outside the engine reads: until unpinned they keep their place and content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from engine.kv_cache import KvCache
from engine.tiers.block_directory import BlockDamaged
from engine.tiers.block_places import BlockPlaces, Place
from kvstore.block_hash import BlockHash, BlockTier


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedRun:
    """Leading blocks that are here, each in the fastest tier that has it. Readable from any thread until
    Engine.unpin(pin_id)."""

    pin_id: int  # never used again
    places: tuple[Place, ...]
    kv_cache: KvCache
    tiers: BlockPlaces
    damaged: list[BlockHash] = field(default_factory=list)  # found so by a reader

    @property
    def num_blocks(self) -> int:
        return len(self.places)

    def read_blocks(self, start: int, stop: int) -> memoryview:
        """A copy of blocks [start, stop) of the run, [layer][block][token in block][token_shape].
        BlockDamaged, a ValueError, when a block is not what it was."""
        block_ids = self.is_on_device(start, stop)
        if block_ids is not None:
            return self.kv_cache.read_blocks(0, self.kv_cache.layout.num_layers, block_ids)
        num_layers = self.kv_cache.layout.num_layers
        blocks = [np.frombuffer(self._read(place), np.uint8) for place in self.places[start:stop]]
        joined = np.stack([block.reshape(num_layers, -1) for block in blocks], axis=1)
        return np.ascontiguousarray(joined).reshape(-1).data

    def is_on_device(self, start: int, stop: int) -> list[int] | None:
        """Block ids of blocks [start, stop) of the run in the KV cache; None when they are elsewhere."""
        return self._all_in(BlockTier.DEVICE, start, stop)

    def host_slots(self, start: int, stop: int) -> list[int] | None:
        """Slots of blocks [start, stop) of the run in host memory; None when they are elsewhere."""
        return self._all_in(BlockTier.HOST, start, stop)

    def _all_in(self, tier: BlockTier, start: int, stop: int) -> list[int] | None:
        places = self.places[start:stop]
        if any(place.tier is not tier for place in places):
            return None
        return [place.where for place in places]

    def _read(self, place: Place) -> memoryview:
        num_layers = self.kv_cache.layout.num_layers
        if place.tier is BlockTier.DEVICE:
            return self.kv_cache.read_blocks(0, num_layers, [place.where])
        if place.tier is BlockTier.HOST:
            assert self.tiers.host is not None
            return self.tiers.host.blocks.read_blocks(0, num_layers, [place.where])
        assert self.tiers.disk is not None and place.key is not None
        try:
            return self.tiers.disk.directory.read(place.key)
        except (OSError, BlockDamaged) as error:
            self.damaged.append(place.block_hash)
            raise BlockDamaged(f"a block on disk cannot be read: {error}") from error


class Pins:
    """Of all blocks of the device three quarters at most are pinned, whatever tier they are in: the rest is
    for sequences."""

    def __init__(self, places: BlockPlaces, kv_cache: KvCache) -> None:
        self._places = places
        self._kv_cache = kv_cache
        self._max_blocks = max(1, places.pool.num_blocks * 3 // 4)
        self._num_blocks = 0
        self._runs: dict[int, PinnedRun] = {}
        self._ids = itertools.count(1)

    def pin(self, hashes: list[BlockHash]) -> PinnedRun:
        """The longest leading run of these blocks that is here and may be pinned, maybe none."""
        places = []
        for block_hash in hashes[: self._max_blocks - self._num_blocks]:
            place = self._places.pin(block_hash, with_device=True)
            if place is None:
                break
            places.append(place)
        run = PinnedRun(
            pin_id=next(self._ids), places=tuple(places), kv_cache=self._kv_cache, tiers=self._places
        )
        self._runs[run.pin_id] = run
        self._num_blocks += len(places)
        return run

    def unpin(self, pin_id: int) -> bool:
        """Idempotent; whether blocks came back."""
        run = self._runs.pop(pin_id, None)
        if run is None:
            return False
        self._places.unpin(run.places)
        for block_hash in run.damaged:
            self._places.discard_from_disk(block_hash)
        self._num_blocks -= run.num_blocks
        return bool(run.num_blocks)

    def block_ids(self) -> Iterator[int]:
        """Of every pin on the device, as often as it is pinned."""
        for run in self._runs.values():
            yield from (place.where for place in run.places if place.tier is BlockTier.DEVICE)
