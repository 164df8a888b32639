"""The receiving side of hand-offs: blocks are promised before their contents come.

Life of a reservation:
1. reserve(): references to the cached prefix are held, so that the sender may leave those blocks out.
2. extend(): the sender has begun; as soon as there is room the rest of the blocks is allocated (EXTENDED).
3. commit(): the contents and the first token are there; the sequence runs like any other.
Aborted in any state, Scheduler.remove() gives everything back.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from engine.speculation.draft_state import DraftState

OnReady = Callable[[list[int]], None]


class Handoffs:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._callbacks: dict[int, OnReady] = {}  # by seq_id, of the sequences that wait for blocks

    def reserve(self, seq: Sequence) -> int:
        """Number of leading blocks held."""
        scheduler = self._scheduler
        scheduler.enlist(seq)
        hits = scheduler.cached_prefix(seq)
        scheduler.take_prefix(seq, hits[: self._max_held_blocks(seq)])
        seq.num_hit_tokens = seq.num_computed_tokens
        seq.status = SequenceStatus.RESERVED
        scheduler.reserved[seq.seq_id] = seq
        return len(seq.block_table)

    def extend(self, seq: Sequence, on_ready: OnReady) -> None:
        """on_ready(block ids of the whole prompt), at once or later, unless aborted before."""
        assert seq.seq_id not in self._callbacks, f"sequence {seq.seq_id} is being extended already"
        self._scheduler.enlist(seq)
        insort(self._scheduler.extending, seq, key=lambda each: each.precedence)
        self._callbacks[seq.seq_id] = on_ready
        self.grant()

    def grant(self) -> None:
        """Give blocks to those that wait for them, by precedence among them and the sequences that
        wait to run."""
        scheduler = self._scheduler
        while scheduler.extending and scheduler.has_slot:
            seq = scheduler.extending[0]
            if scheduler.waiting and scheduler.waiting[0].precedence < seq.precedence:
                return
            num_new = scheduler.num_blocks_of(seq.num_tokens) - len(seq.block_table)
            if not scheduler.has_room(seq, num_new):
                return
            del scheduler.extending[0]
            scheduler.allocate_rest(seq)
            seq.status = SequenceStatus.EXTENDED
            scheduler.num_extended += 1
            self._callbacks.pop(seq.seq_id)(list(seq.block_table))

    def commit(self, seq: Sequence, first_token_id: int, draft: DraftState) -> None:
        """All blocks are written: the sequence runs."""
        scheduler = self._scheduler
        del scheduler.reserved[seq.seq_id]
        scheduler.num_extended -= 1
        seq.num_computed_tokens = seq.num_tokens
        scheduler.register_blocks(seq, seq.num_tokens)
        seq.draft = draft
        seq.token_ids.append(first_token_id)
        seq.has_emitted = True
        scheduler.join(seq)

    def forget(self, seq: Sequence) -> None:
        """The sequence was removed."""
        self._callbacks.pop(seq.seq_id, None)

    def _max_held_blocks(self, seq: Sequence) -> int:
        """Prefixes held by sequences that still need blocks must leave room for the largest of these, or they
        could wait for each other for ever."""
        scheduler = self._scheduler
        pending = [s for s in scheduler.reserved.values() if s.status is SequenceStatus.RESERVED]
        largest = max(scheduler.num_blocks_of(s.num_tokens) for s in (*pending, seq))
        num_held = sum(len(s.block_table) for s in pending)
        return max(0, scheduler.pool.num_blocks - largest - num_held)
