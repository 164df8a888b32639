"""Where this worker has each block: device, host memory, disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.block_pool import BlockPool
from engine.outputs import BlockEvents
from engine.tiers.block_key import BlockKey
from engine.tiers.disk_tier import DiskTier
from engine.tiers.host_tier import HostTier
from kvstore.block_hash import BlockHash, BlockTier


class Place(NamedTuple):
    """Of a pinned block."""

    tier: BlockTier
    block_hash: BlockHash
    where: int = -1  # block id on the device, slot in host memory
    key: BlockKey | None = None  # on disk


class BlockPlaces:
    """Belongs to the engine thread. Changes of the lower tiers go through here, so that none is missed in the
    events."""

    def __init__(self, pool: BlockPool, host: HostTier | None = None, disk: DiskTier | None = None) -> None:
        self.pool = pool
        self.host = host
        self.disk = disk
        self._before: dict[BlockHash, BlockTier | None] = {}  # of what changed below the device
        if host is not None:
            host.on_evict = lambda block_hash: self._note(block_hash, BlockTier.HOST)
        if disk is not None:
            disk.on_evict = lambda block_hash: self._note(
                block_hash, BlockTier.HOST if self._is_in_host(block_hash) else BlockTier.DISK
            )
            self._before.update(dict.fromkeys(disk.hashes()))

    def lower_tier(self, block_hash: BlockHash) -> BlockTier | None:
        """The fastest below the device that has it."""
        if self._is_in_host(block_hash):
            return BlockTier.HOST
        if self.disk is not None and block_hash in self.disk:
            return BlockTier.DISK
        return None

    def num_leading(self, hashes: Iterable[BlockHash]) -> int:
        """How many of the first of these are below the device."""
        num_blocks = 0
        for block_hash in hashes:
            if self.lower_tier(block_hash) is None:
                break
            num_blocks += 1
        return num_blocks

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """A sequence begins with these blocks, wherever they are."""
        for block_hash in reversed(hashes):
            if self._is_in_host(block_hash):
                assert self.host is not None
                self.host.use(block_hash)
            if self.disk is not None and block_hash in self.disk:
                self.disk.use(block_hash)

    def commit_to_host(self, key: BlockKey, slot: int) -> None:
        assert self.host is not None
        self._note(key.block_hash, self.lower_tier(key.block_hash))
        self.host.commit(slot)

    def commit_to_disk(self, key: BlockKey) -> None:
        assert self.disk is not None
        self._note(key.block_hash, self.lower_tier(key.block_hash))
        self.disk.commit(key)

    def pin(self, block_hash: BlockHash, *, with_device: bool) -> Place | None:
        """In the fastest tier, or the fastest below the device. Give it back with unpin()."""
        block_id = self.pool.block_of(block_hash) if with_device else None
        if block_id is not None:
            self.pool.acquire([block_id])
            return Place(BlockTier.DEVICE, block_hash, block_id)
        if self._is_in_host(block_hash):
            assert self.host is not None
            return Place(BlockTier.HOST, block_hash, self.host.pin(block_hash))
        if self.disk is not None and block_hash in self.disk:
            return Place(BlockTier.DISK, block_hash, key=self.disk.pin(block_hash))
        return None

    def unpin(self, places: Iterable[Place]) -> None:
        """In the order of the sequence."""
        places = list(places)
        self.pool.release(place.where for place in places if place.tier is BlockTier.DEVICE)
        for place in places:
            if place.tier is BlockTier.HOST:
                assert self.host is not None
                self.host.unpin(place.block_hash)
            elif place.tier is BlockTier.DISK:
                assert self.disk is not None
                self.disk.unpin(place.block_hash)

    def discard_from_disk(self, block_hash: BlockHash) -> None:
        """Its file is damaged or gone. Idempotent."""
        if self.disk is not None:
            self.disk.discard(block_hash)

    def hashes(self) -> list[BlockHash]:
        """Of every block in any tier."""
        found = set(self.pool.registered_hashes())
        for tier in (self.host, self.disk):
            if tier is not None:
                found.update(tier.hashes())
        return list(found)

    def take_events(self) -> BlockEvents:
        """What changed since the last call, as the fastest tier of each block shows it."""
        device = self.pool.take_events()
        if not self._before:
            if not device.removed or (self.host is None and self.disk is None):
                return device
        before, self._before = self._before, {}
        placed = dict(device.placed)
        removed = []
        changed = set(device.removed)
        for block_hash, tier in before.items():
            if self.pool.block_of(block_hash) is None and self.lower_tier(block_hash) is not tier:
                changed.add(block_hash)
        for block_hash in changed:
            now = self.lower_tier(block_hash)
            if now is None:
                removed.append(block_hash)
            else:
                placed[block_hash] = now
        return BlockEvents(placed=tuple(placed.items()), removed=tuple(removed))

    def check_integrity(self) -> None:
        """AssertionError when free + cached + used = total does not hold in a lower tier."""
        for tier in (self.host, self.disk):
            if tier is not None:
                tier.check_integrity()

    def _is_in_host(self, block_hash: BlockHash) -> bool:
        return self.host is not None and block_hash in self.host

    def _note(self, block_hash: BlockHash, before: BlockTier | None) -> None:
        self._before.setdefault(block_hash, before)
