"""Leading blocks of one sequence out of this worker's own lower tiers, the last ones first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.kv_cache import KvCache
from engine.kv_load import KvLoad
from engine.tiers.background_threads import BackgroundThreads
from engine.tiers.block_copy import BlockCopy
from engine.tiers.block_directory import BlockDamaged
from engine.tiers.block_places import BlockPlaces, Place
from engine.tiers.transfer_rate import TransferRate
from kvstore.block_hash import BlockHash, BlockTier

# At once: little, so that compute can take what is in front, and so that a damaged block costs few others.
CLAIM_BYTES = {BlockTier.HOST: 2 << 20, BlockTier.DISK: 256 << 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEnvironment:
    """What all loads of one worker share."""

    places: BlockPlaces
    kv_cache: KvCache
    copy: BlockCopy
    threads: BackgroundThreads
    rates: Mapping[BlockTier, TransferRate]


@dataclass(slots=True)
class _Tally:
    num_bytes: dict[BlockTier, int] = field(default_factory=dict)
    seconds: dict[BlockTier, float] = field(default_factory=dict)
    damaged: BlockHash | None = None

    def add(self, tier: BlockTier, num_bytes: int, seconds: float) -> None:
        self.num_bytes[tier] = self.num_bytes.get(tier, 0) + num_bytes
        self.seconds[tier] = self.seconds.get(tier, 0.0) + seconds


class BlockSource:
    """A KvSource (engine/kv_load.py). Made on the engine thread; until start() it holds nothing."""

    def __init__(self, environment: LoadEnvironment, first_block: int, hashes: list[BlockHash]) -> None:
        """hashes: of the sequence's blocks from first_block on, all of them in a lower tier."""
        self._environment = environment
        self._first_block = first_block
        self._hashes = hashes
        self.num_blocks = first_block + len(hashes)
        self._tiers = [environment.places.lower_tier(block_hash) for block_hash in hashes]
        # The slowest one: it decides how long it takes.
        self.tier: BlockTier | None = max(tier for tier in self._tiers if tier is not None)

    def estimate_s(self, num_blocks: int) -> float:
        block_bytes = self._environment.kv_cache.layout.block_bytes
        wanted = self._tiers[:num_blocks]
        rates = self._environment.rates
        return sum(
            rate.estimate_s(num * block_bytes) for tier, rate in rates.items() if (num := wanted.count(tier))
        )

    def start(self, load: KvLoad) -> None:
        places = []
        for block_hash in self._hashes[: load.end_block - self._first_block]:
            place = self._environment.places.pin(block_hash, with_device=False)
            assert place is not None, "a block left its tier between lookup and start"
            places.append(place)
        self._environment.threads.submit(
            lambda: self._run(load, places), lambda future: self._ended(places, future)
        )

    def _run(self, load: KvLoad, places: list[Place]) -> _Tally:
        tally = _Tally()
        back = load.end_block
        try:
            while claimed := load.claim(self._next_first(back, places)):
                tier = places[claimed.start - self._first_block].tier
                began = time.monotonic()
                self._write(load, claimed, places, tally)
                tally.add(tier, len(claimed) * self._block_bytes, time.monotonic() - began)
                load.complete(claimed)
                back = claimed.start
        except (OSError, BlockDamaged) as error:
            load.fail(str(error))
        except BaseException as error:
            load.fail(type(error).__name__)
            raise
        return tally

    @property
    def _block_bytes(self) -> int:
        return self._environment.kv_cache.layout.block_bytes

    def _next_first(self, back: int, places: list[Place]) -> int:
        """The first of the last blocks before `back` that are in one tier, a few of them."""
        stop = back - self._first_block
        start = max(0, stop - 1)
        least = max(0, stop - max(1, CLAIM_BYTES[places[start].tier] // self._block_bytes))
        while start > least and places[start - 1].tier is places[start].tier:
            start -= 1
        return self._first_block + start

    def _write(self, load: KvLoad, claimed: range, places: list[Place], tally: _Tally) -> None:
        wanted = places[claimed.start - self._first_block : claimed.stop - self._first_block]
        block_ids = load.block_ids(claimed)
        if wanted[0].tier is BlockTier.HOST:
            self._environment.copy.load([place.where for place in wanted], block_ids)
            return
        disk = self._environment.places.disk
        assert disk is not None
        kv_cache = self._environment.kv_cache
        for place, block_id in zip(wanted, block_ids, strict=True):
            assert place.key is not None
            try:
                kv_bytes = disk.directory.read(place.key)
            except (OSError, BlockDamaged):
                tally.damaged = place.block_hash
                raise
            kv_cache.write_blocks(0, kv_cache.layout.num_layers, [block_id], kv_bytes)

    def _ended(self, places: list[Place], future: Future[_Tally]) -> None:
        environment = self._environment
        environment.places.unpin(places)
        tally = future.result()
        for tier, num_bytes in tally.num_bytes.items():
            environment.rates[tier].observe(num_bytes, tally.seconds[tier])
        if tally.damaged is not None:
            environment.places.discard_from_disk(tally.damaged)
