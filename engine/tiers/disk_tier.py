"""Blocks in files: which are there, and which go when there is no room.

Belongs to the engine thread, which never touches a file: what must be removed is taken by the thread that
writes, so that it happens in the order in which it was decided.

Always: free + cached + used = total, in files; used are the pinned ones and those being written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from engine.tiers.block_directory import BlockDirectory
from engine.tiers.block_key import BlockKey
from engine.tiers.eviction_order import EvictionOrder
from kvstore.block_hash import BlockHash

OnEvict = Callable[[BlockHash], None]


class DiskTier:
    def __init__(self, directory: BlockDirectory, max_bytes: int) -> None:
        """Finds what an earlier process left. ValueError when not one block fits."""
        self.directory = directory
        self.num_files = max_bytes // directory.file_bytes
        if self.num_files < 1:
            raise ValueError(
                f"a KV block takes {directory.file_bytes} bytes of disk, {max_bytes} are allowed"
            )
        self.on_evict: OnEvict = lambda block_hash: None  # called with what goes
        self._order = EvictionOrder()
        self._writing: set[BlockHash] = set()
        self._doomed: dict[BlockHash, BlockKey] = {}  # damaged, and still pinned
        self._removals: list[Path] = []
        found = directory.scan()
        self._others = deque(found.others)  # of another model or layout: they go first
        self._others_bytes = sum(file.num_bytes for file in found.others)
        # The shallow ones first, so that what hangs together counts as used together.
        for key in sorted(found.keys, key=lambda key: key.depth):
            self._order.add(key)
        self._make_room(0)

    @property
    def num_free(self) -> int:
        return self.num_files - self.num_cached - self.num_used

    @property
    def num_cached(self) -> int:
        """Files of other layouts count as the blocks that would take their place."""
        num_others = -(-self._others_bytes // self.directory.file_bytes)
        return num_others + len(self._order) - self._order.num_pinned

    @property
    def num_used(self) -> int:
        return len(self._writing) + self._order.num_pinned

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._order and block_hash not in self._doomed

    def has_or_gets(self, block_hash: BlockHash) -> bool:
        return block_hash in self or block_hash in self._writing

    def hashes(self) -> list[BlockHash]:
        return [key.block_hash for key in self._order.keys() if key.block_hash not in self._doomed]

    def use(self, block_hash: BlockHash) -> None:
        self._order.use(block_hash)

    def reserve(self, key: BlockKey) -> bool:
        """Room for this block; then commit() or cancel(). False: it is here or being written, or all that is
        here is in use or comes before this block."""
        if key.block_hash in self._order or key.block_hash in self._writing:
            return False
        self._order.pin_parent(key)
        if not self._make_room(1):
            self._order.unpin_parent(key)
            return False
        self._writing.add(key.block_hash)
        return True

    def commit(self, key: BlockKey) -> None:
        self._writing.remove(key.block_hash)
        self._order.add(key)
        self._unpin_parent(key)

    def cancel(self, key: BlockKey) -> None:
        self._writing.remove(key.block_hash)
        self._unpin_parent(key)

    def pin(self, block_hash: BlockHash) -> BlockKey:
        """The file stays until as many calls of unpin()."""
        self._order.pin(block_hash)
        return self._order.key_of(block_hash)

    def unpin(self, block_hash: BlockHash) -> None:
        self._order.unpin(block_hash)
        self._remove_doomed(block_hash)

    def discard(self, block_hash: BlockHash) -> None:
        """The file is damaged or gone. Idempotent."""
        if block_hash not in self:
            return
        self.on_evict(block_hash)
        key = self._order.key_of(block_hash)
        if self._order.is_pinned(block_hash):
            self._doomed[block_hash] = key
        else:
            self._remove(key)

    def take_removals(self) -> list[Path]:
        """Files to remove, for the thread that writes, before what it writes next."""
        removals, self._removals = self._removals, []
        return removals

    def close(self) -> None:
        self.directory.close()

    def check_integrity(self) -> None:
        assert self.num_free >= 0
        assert self.num_free + self.num_cached + self.num_used == self.num_files
        assert not self._writing & {key.block_hash for key in self._order.keys()}

    def _make_room(self, num_blocks: int) -> bool:
        while self.num_free < num_blocks:
            if self._others:
                other = self._others.popleft()
                self._others_bytes -= other.num_bytes
                self._removals.append(other.path)
                continue
            key = self._order.pop()
            if key is None:
                return False
            self.on_evict(key.block_hash)
            self._removals.append(self.directory.path_of(key))
        return True

    def _unpin_parent(self, key: BlockKey) -> None:
        self._order.unpin_parent(key)
        self._remove_doomed(key.parent)

    def _remove_doomed(self, block_hash: BlockHash) -> None:
        if block_hash in self._doomed and not self._order.is_pinned(block_hash):
            self._remove(self._doomed.pop(block_hash))

    def _remove(self, key: BlockKey) -> None:
        self._order.remove(key.block_hash)
        self._removals.append(self.directory.path_of(key))
