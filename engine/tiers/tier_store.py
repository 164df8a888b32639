"""The lower tiers of one worker: what is kept there, what comes back, and the threads that carry it.

Device -> host memory -> disk by engine.tiers.write_behind, the way back by engine.tiers.block_source. All
methods belong to the engine thread and return at once; poll() follows up what the threads have done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.kv_cache import KvCache
from engine.outputs import BlockEvents, TierStats
from engine.tiers.background_threads import BackgroundThreads
from engine.tiers.block_copy import BlockCopy
from engine.tiers.block_key import BlockKey
from engine.tiers.block_places import BlockPlaces
from engine.tiers.block_source import BlockSource, LoadEnvironment
from engine.tiers.disk_tier import DiskTier
from engine.tiers.host_tier import HostTier
from engine.tiers.transfer_rate import TransferRate
from engine.tiers.write_behind import WriteBehind
from kvstore.block_hash import BlockHash, BlockTier

_LOAD_THREADS = 2  # a load from disk must not hold up one from memory


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerTiers:
    """None: there is no such tier. Blocks reach the disk through host memory, so it needs some."""

    host: HostTier | None = None
    disk: DiskTier | None = None
    is_host_staging: bool = False  # host memory is there for the disk only


class TierStore:
    def __init__(self, pool: BlockPool, kv_cache: KvCache, tiers: LowerTiers) -> None:
        self.on_change: Callable[[], None] = lambda: None  # any thread: poll() has something to do
        self.places = BlockPlaces(pool, tiers.host, tiers.disk)
        self._tiers = tiers
        self._block_bytes = kv_cache.layout.block_bytes
        self._write_behind: WriteBehind | None = None
        self._loads: LoadEnvironment | None = None
        if tiers.host is not None:
            copy = BlockCopy(kv_cache, tiers.host.blocks)
            self._write_behind = WriteBehind(
                self.places, copy, self._changed, is_staging=tiers.is_host_staging
            )
            self._loads = LoadEnvironment(
                places=self.places,
                kv_cache=kv_cache,
                copy=copy,
                threads=BackgroundThreads("kv-load", self._changed, _LOAD_THREADS),
                rates={
                    BlockTier.HOST: TransferRate(assumed_bytes_per_s=4e9, latency_s=0.0005),
                    BlockTier.DISK: TransferRate(assumed_bytes_per_s=500e6, latency_s=0.002),
                },
            )

    @property
    def is_idle(self) -> bool:
        """Nothing is being saved or loaded."""
        has_saved = self._write_behind is None or self._write_behind.is_idle
        return has_saved and (self._loads is None or not self._loads.threads.num_open)

    def offer(self, block_id: int, key: BlockKey) -> None:
        """A block of the device is full and registered: keep it in the lower tiers too."""
        if self._write_behind is not None:
            self._write_behind.offer(block_id, key)

    def use(self, root: BlockHash, hashes: list[BlockHash]) -> None:
        """A sequence begins with these blocks, wherever they are. What was lost on the way to the lower tiers
        and is on the device still, is offered again."""
        self.places.use(hashes)
        if self._write_behind is None:
            return
        for depth, block_hash in enumerate(hashes):
            block_id = self.places.pool.block_of(block_hash)
            if block_id is not None:
                self.offer(block_id, BlockKey(block_hash, hashes[depth - 1] if depth else root, depth))

    def poll(self) -> None:
        if self._loads is not None and self._write_behind is not None:
            self._loads.threads.poll()
            self._write_behind.poll()

    def pump(self) -> None:
        """Blocks were offered."""
        if self._write_behind is not None:
            self._write_behind.pump()

    def source(self, first_block: int, hashes: list[BlockHash]) -> BlockSource | None:
        """For the blocks from first_block on as far as they are in a lower tier; hashes are theirs."""
        num_blocks = self.places.num_leading(hashes)
        if not num_blocks or self._loads is None:
            return None
        return BlockSource(self._loads, first_block, hashes[:num_blocks])

    def take_events(self) -> BlockEvents:
        return self.places.take_events()

    def stats(self) -> tuple[TierStats, ...]:
        num_lost = 0 if self._write_behind is None else self._write_behind.num_lost
        pairs = ((BlockTier.HOST, self._tiers.host), (BlockTier.DISK, self._tiers.disk))
        rates = {} if self._loads is None else self._loads.rates
        return tuple(
            TierStats(
                tier=name,
                num_free_blocks=tier.num_free,
                num_cached_blocks=tier.num_cached,
                num_used_blocks=tier.num_used,
                block_bytes=self._block_bytes,
                num_lost_blocks=num_lost,
                load_bytes_per_s=rates[name].bytes_per_s,
                load_latency_s=rates[name].latency_s,
            )
            for name, tier in pairs
            if tier is not None
        )

    def close(self) -> None:
        """Waits for what the threads are doing. Idempotent."""
        if self._loads is not None and self._write_behind is not None:
            self._loads.threads.close()
            self._write_behind.close()
        if self._tiers.disk is not None:
            self._tiers.disk.close()

    def _changed(self) -> None:
        self.on_change()
