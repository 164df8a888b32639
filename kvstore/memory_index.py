"""The prefix index of one process: what a router's mirror fills and asks.

How it keeps blocks:
1. One entry for a block, however many workers hold it: an integer with two bits for each worker. A lookup
   costs the same for one worker and for hundreds, except where a worker's run ends or changes its tier.
2. Blocks with the same holders that came one after the other, or that a lookup met so, form a run: their
   hashes in one piece, its number in the low bits of their entries. A prompt that follows a run, from any of
   its blocks on and for as long as it does, is compared up to 64 blocks at a time. Hashes are compared in
   full and a run that lost a member is forgotten, so answers are exact.
3. A worker that goes is hidden at once. sweep() frees what it held, piece by piece.
4. Entries are integers and bytes, which the garbage collector does not visit: a full collection of a million
   objects would stop the process for a fifth of a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from kvstore.block_hash import HASH_SIZE_BYTES, BlockHash, BlockTier
from kvstore.block_holders import SLOT_BITS, PrefixTally, slot_mask, slot_value
from kvstore.prefix_index import PrefixHit

_NUM_SHARDS = 256  # by the first byte of a hash; a table that grows or is swept holds nobody up
_RUN_BITS = 40  # of an entry, for the number of its run; the holders are above
_RUN_MASK = (1 << _RUN_BITS) - 1
_MIN_RUN, _MAX_RUN = 8, 64  # blocks
_MAX_SHARED = 4096

_Entry = int


class MemoryIndex:
    """At most `max_blocks` different blocks.

    When it is full new blocks are refused (and counted in num_refused): hits get shorter, never wrong.
    """

    def __init__(self, max_blocks: int = 4_000_000) -> None:
        self._max_blocks = max_blocks
        self._shards: tuple[dict[BlockHash, _Entry], ...] = tuple({} for _ in range(_NUM_SHARDS))
        self._runs: dict[int, bytes] = {}  # number -> hashes in order, while all of them have this number
        self._last_run = 0  # numbers are not used twice; 0: no run
        self._shared: dict[_Entry, _Entry] = {}  # equal entries without a run as one object; a cache
        self._slots: dict[str, int] = {}  # worker id -> slot
        self._names: dict[int, str] = {}
        self._shown = 0  # the low bit of each named slot
        self._num_held: dict[int, int] = {}  # slot -> blocks; of every slot that is named, filled or dead
        self._free_slots: list[int] = []  # a heap: low slots keep the integers short
        self._dead_slots: dict[int, int] = {}  # slot -> shards still to sweep
        self._next_shard = 0
        self.num_blocks = 0  # different ones, with what is left to sweep
        self.num_refused = 0

    def publish(
        self, worker_id: str, hashes: Iterable[BlockHash], tier: BlockTier = BlockTier.DEVICE
    ) -> None:
        """The worker holds these blocks now, and `tier` is the fastest where it has them."""
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._take_slot()
            self._show(worker_id, slot)
        self._place(slot, hashes, tier + 1)

    def evict(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """The worker holds these blocks no longer, in no tier."""
        slot = self._slots.get(worker_id)
        if slot is not None:
            self._place(slot, hashes, 0)

    def drop(self, worker_id: str) -> None:
        """The worker holds nothing. Takes no time; sweep() afterwards."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            del self._names[slot]
            self._shown &= ~slot_mask(slot)
            self._abandon(slot)

    def replace(self, worker_id: str) -> Replacement:
        """For reading everything a worker holds piece by piece while lookups go on with what was known."""
        return Replacement(self, worker_id)

    def sweep(self) -> bool:
        """Free a 256th of what dropped workers left. False: nothing is left."""
        if not self._dead_slots:
            return False
        shard = self._shards[self._next_shard]
        self._next_shard = (self._next_shard + 1) % _NUM_SHARDS
        dead = self._dead_bits()
        cleaned: dict[_Entry, _Entry] = {}
        ownerless = []
        for block_hash, entry in shard.items():
            if entry & dead:
                clean = cleaned.setdefault(entry, entry & ~dead)
                shard[block_hash] = clean  # keeps its run: the other members lose the same holders
                if clean <= _RUN_MASK:
                    ownerless.append(block_hash)
        for block_hash in ownerless:
            self._runs.pop(shard.pop(block_hash), None)
        self.num_blocks -= len(ownerless)
        self._count_swept_shard()
        return bool(self._dead_slots)

    def lookup(self, hashes: Sequence[BlockHash]) -> list[PrefixHit]:
        """Exact: the longest leading run of each worker. Longest first, equal ones by worker id."""
        first = self._shards[hashes[0][0]].get(hashes[0]) if hashes else None
        if first is None:
            return []
        tally = PrefixTally(first >> _RUN_BITS, self._shown)
        if tally.is_anyone_left:
            self._follow(hashes, tally)
        hits = [
            PrefixHit(self._names[slot], sum(counts), (counts[0], counts[1], counts[2]))
            for slot, counts in tally.counts.items()
        ]
        return sorted(hits, key=lambda hit: (-hit.num_blocks, hit.worker_id))

    def workers(self) -> dict[str, int]:
        """Number of blocks by worker."""
        return {worker_id: self._num_held[slot] for worker_id, slot in self._slots.items()}

    def tiers(self, worker_id: str) -> dict[BlockHash, BlockTier]:
        """The worker's blocks with their tiers. Reads the whole index."""
        slot = self._slots.get(worker_id)
        if slot is None:
            return {}
        return {
            block_hash: BlockTier(value - 1)
            for shard in self._shards
            for block_hash, entry in shard.items()
            if (value := slot_value(entry >> _RUN_BITS, slot))
        }

    def blocks(self, worker_id: str) -> frozenset[BlockHash]:
        """Reads the whole index."""
        return frozenset(self.tiers(worker_id))

    def check_integrity(self) -> None:
        """AssertionError when counts or runs contradict the entries. Reads the whole index."""
        entries = {block_hash: entry for shard in self._shards for block_hash, entry in shard.items()}
        assert len(entries) == self.num_blocks <= self._max_blocks
        live = ~self._dead_bits()
        for number, raw in self._runs.items():
            members = [raw[i : i + HASH_SIZE_BYTES] for i in range(0, len(raw), HASH_SIZE_BYTES)]
            assert len({entries[BlockHash(member)] & live for member in members}) == 1
            assert entries[BlockHash(members[0])] & _RUN_MASK == number
        for slot in self._num_held.keys() - self._dead_slots.keys():
            held = sum(slot_value(entry >> _RUN_BITS, slot) > 0 for entry in entries.values())
            assert self._num_held[slot] == held

    def _follow(self, hashes: Sequence[BlockHash], tally: PrefixTally) -> None:
        """Until nobody holds on."""
        shards, runs = self._shards, self._runs
        num_blocks = len(hashes)
        position = walked_from = 0
        entry: _Entry | None = None
        holders = 0
        while position < num_blocks:
            block_hash = hashes[position]
            before, entry = entry, shards[block_hash[0]].get(block_hash)
            if entry is None:
                break
            if entry != before:
                before_holders, holders = holders, entry >> _RUN_BITS
                if holders != before_holders:
                    self._join(hashes, walked_from, position, before_holders)
                    walked_from = position
                    tally.enter(holders, position)
                    if not tally.is_anyone_left:
                        break
                raw = runs.get(entry & _RUN_MASK)
                num_same = 0 if raw is None else _num_same(raw, hashes, position)
                if num_same >= _MIN_RUN or 1 < num_same == num_blocks - position:
                    self._join(hashes, walked_from, position, holders)
                    position += num_same
                    walked_from = position
                    entry = None  # the run may have more of this prompt, further on
                    continue
            position += 1
        self._join(hashes, walked_from, position, holders)
        tally.enter(0, position)

    def _join(self, hashes: Sequence[BlockHash], start: int, end: int, holders: int) -> None:
        """Make runs of blocks with equal holders that a lookup had to walk."""
        if end - start < _MIN_RUN:
            return
        for first in range(start, end, _MAX_RUN):
            self._assign(hashes[first : min(first + _MAX_RUN, end)], holders)

    def _place(self, slot: int, hashes: Iterable[BlockHash], value: int) -> None:
        """`value`: what the slot shall say for these blocks."""
        kept, added = ~slot_mask(slot), value << SLOT_BITS * slot
        piece: list[BlockHash] = []  # with equal holders to be
        piece_holders = 0
        for block_hash in dict.fromkeys(hashes):
            entry = self._shards[block_hash[0]].get(block_hash)
            if entry is None and not (value and self._admit()):
                continue
            before = (entry or 0) >> _RUN_BITS
            holders = before & kept | added
            if holders == before:
                continue
            self._num_held[slot] += (value > 0) - (slot_value(before, slot) > 0)
            if holders != piece_holders or len(piece) == _MAX_RUN:
                self._assign(piece, piece_holders)
                piece, piece_holders = [], holders
            piece.append(block_hash)
        self._assign(piece, piece_holders)

    def _admit(self) -> bool:
        """Whether there is room for one more block; counts it."""
        has_room = self.num_blocks < self._max_blocks
        self.num_blocks += has_room
        self.num_refused += not has_room
        return has_room

    def _assign(self, hashes: Sequence[BlockHash], holders: int) -> None:
        """New entries for these blocks. The runs that they leave are forgotten: other members keep their
        entries, whose number says nothing any more."""
        shards, runs = self._shards, self._runs
        if not holders:
            for block_hash in hashes:
                runs.pop(shards[block_hash[0]].pop(block_hash) & _RUN_MASK, None)
            self.num_blocks -= len(hashes)
            return
        entry = holders << _RUN_BITS
        if len(hashes) >= _MIN_RUN:
            self._last_run += 1
            runs[self._last_run] = b"".join(hashes)
            entry |= self._last_run
        else:
            if len(self._shared) == _MAX_SHARED:
                self._shared.clear()
            entry = self._shared.setdefault(entry, entry)
        for block_hash in hashes:
            shard = shards[block_hash[0]]
            runs.pop(shard.get(block_hash, 0) & _RUN_MASK, None)
            shard[block_hash] = entry

    def _take_slot(self) -> int:
        # Every slot ever taken is counted in one of the two.
        slot = heapq.heappop(self._free_slots) if self._free_slots else len(self._num_held)
        self._num_held[slot] = 0
        return slot

    def _show(self, worker_id: str, slot: int) -> None:
        self._slots[worker_id] = slot
        self._names[slot] = worker_id
        self._shown |= 1 << SLOT_BITS * slot

    def _abandon(self, slot: int) -> None:
        self._dead_slots[slot] = _NUM_SHARDS

    def _dead_bits(self) -> int:
        """Of entries. Shards that are swept have none, so that a new entry made from an old one never has any
        that no sweep would find."""
        return sum(map(slot_mask, self._dead_slots)) << _RUN_BITS

    def _count_swept_shard(self) -> None:
        for slot in list(self._dead_slots):
            self._dead_slots[slot] -= 1
            if not self._dead_slots[slot]:
                del self._dead_slots[slot], self._num_held[slot]
                heapq.heappush(self._free_slots, slot)


def _num_same(run: bytes, hashes: Sequence[BlockHash], position: int) -> int:
    """How many blocks of the prompt, from `position` on, the run has in the same order from that block on."""
    start = run.find(hashes[position])
    if start % HASH_SIZE_BYTES:  # across two hashes, or not there at all
        return 0
    most = (len(run) - start) // HASH_SIZE_BYTES
    prompt = b"".join(hashes[position : position + most])
    if run.startswith(prompt, start):
        return len(prompt) // HASH_SIZE_BYTES
    num_same, num_more = 1, len(prompt) // HASH_SIZE_BYTES  # so many are the same, so many are not
    while num_more - num_same > 1:
        middle = (num_same + num_more) // 2
        if run.startswith(prompt[: middle * HASH_SIZE_BYTES], start):
            num_same = middle
        else:
            num_more = middle
    return num_same


class Replacement:
    """All that a worker holds, read piece by piece and shown at once. End it with show() or discard()."""

    def __init__(self, index: MemoryIndex, worker_id: str) -> None:
        self._index = index
        self._worker_id = worker_id
        self._slot: int | None = index._take_slot()

    def publish(self, hashes: Iterable[BlockHash], tier: BlockTier) -> None:
        """`hashes` in the order of prompts, as far as it is known: any other is right, and slow at first."""
        assert self._slot is not None
        self._index._place(self._slot, hashes, tier + 1)

    def show(self) -> None:
        """Instead of what the index showed of the worker. Takes no time; sweep() afterwards."""
        assert self._slot is not None
        self._index.drop(self._worker_id)
        self._index._show(self._worker_id, self._slot)
        self._slot = None

    def discard(self) -> None:
        """Idempotent, and nothing after show(). sweep() afterwards."""
        if self._slot is not None:
            self._index._abandon(self._slot)
            self._slot = None
