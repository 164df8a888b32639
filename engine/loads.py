"""Sequences whose prefix is being loaded while its front is computed.

1. begin(): the sequence has all its blocks; the source starts to write the last ones of its prefix.
2. take_chunk(): compute takes blocks from the front, as many as the planner says.
3. settle(): both have met; the sequence goes on behind the prefix. A source that failed leaves the rest to
   compute.
4. drop(): the sequence leaves before that. Blocks that its source is still writing are held until it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.block_pool import BlockPool
from engine.kv_load import KvLoad, KvSource, LoadedPrefix, SequenceLoad
from engine.load_planner import LoadPlanner
from engine.outputs import LoadOutcome, LoadStats
from engine.sequence import Sequence
from engine.speculation.draft_state import DraftState

if TYPE_CHECKING:
    from engine.tiers.tier_store import TierStore

_MIN_RECHECK_S = 0.002


@dataclass(frozen=True, slots=True)
class MetLoad:
    """Blocks [first_block, end_block) of the sequence were brought by its source."""

    seq: Sequence
    first_block: int
    end_block: int
    num_hit_tokens: int  # that the sequence has in addition


@dataclass(frozen=True, slots=True)
class _HeldBlocks:
    load: KvLoad
    block_ids: list[int]


class Loads:
    """Belongs to the engine thread."""

    def __init__(
        self, pool: BlockPool, tiers: TierStore | None, planner: LoadPlanner, block_size: int
    ) -> None:
        self.planner = planner
        self.on_change: Callable[[], None] = lambda: None  # any thread: settle() may have something to do
        self.recheck_at: float | None = None  # monotonic: plan anew, even if no source says anything
        self._pool = pool
        self._tiers = tiers
        self._block_size = block_size
        self._loading: list[Sequence] = []
        self._held: list[_HeldBlocks] = []
        self._ended: list[LoadStats] = []

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    def choose(self, seq: Sequence, num_hits: int) -> KvSource | None:
        """A place that has blocks of the sequence behind the first num_hits, and is worth it."""
        if seq.wants_prompt_logprobs:
            return None
        assert seq.prefix is not None
        end_block = (seq.num_tokens - 1) // self._block_size
        hashes = seq.prefix.upto(end_block, seq.token_ids)[:end_block]
        sources = [] if seq.kv_source is None else [seq.kv_source]
        if self._tiers is not None:
            own = self._tiers.source(num_hits, hashes[num_hits:])
            self._tiers.use(seq.prefix.root, hashes[: num_hits if own is None else own.num_blocks])
            sources += [] if own is None else [own]
        return self.planner.choose(sources, num_hits, end_block) if sources else None

    def begin(self, seq: Sequence, source: KvSource) -> None:
        """The sequence has its blocks, and the hits in them are computed."""
        first_block = seq.num_computed_tokens // self._block_size
        end_block = min(source.num_blocks, (seq.num_tokens - 1) // self._block_size)
        load = KvLoad(first_block, seq.block_table[first_block:end_block], lambda: self._changed(load))
        seq.load = SequenceLoad(load, source, time.monotonic())
        if source is seq.kv_source:
            seq.kv_source = None  # it is used once
        self._loading.append(seq)
        source.start(load)

    def take_chunk(self, seq: Sequence, budget: int) -> int:
        """Tokens to compute in this step, whole blocks."""
        assert seq.load is not None
        load = seq.load.load
        remaining_s = 0.0 if load.failure else _remaining_s(seq.load)
        num_open = load.num_open_blocks
        wanted = num_open if load.failure else self.planner.num_compute_blocks(num_open, remaining_s)
        num_blocks = load.advance(min(wanted, budget // self._block_size))
        if not num_blocks and num_open:
            at = time.monotonic() + max(_MIN_RECHECK_S, remaining_s)
            self.recheck_at = at if self.recheck_at is None else min(at, self.recheck_at)
        return num_blocks * self._block_size

    def settle(self) -> list[MetLoad]:
        """The sequences whose load has met, past their prefix; and held blocks come back."""
        self.recheck_at = None
        for held in [held for held in self._held if held.load.close()]:
            self._held.remove(held)
            self._pool.release(held.block_ids)
        return [
            self._end(seq) for seq in list(self._loading) if seq.load is not None and seq.load.load.is_met
        ]

    def drop(self, seq: Sequence) -> None:
        """Before the sequence gives its blocks back."""
        if seq.load is None:
            return
        load, source, began = seq.load.load, seq.load.source, seq.load.began
        if not load.close():
            block_ids = load.writing_ids()
            self._pool.share(block_ids)
            self._held.append(_HeldBlocks(load, block_ids))
        seq.load = None
        self._loading.remove(seq)
        self._ended.append(
            LoadStats(
                tier=source.tier,
                outcome=LoadOutcome.DROPPED,
                num_blocks=load.num_loaded_blocks,
                load_s=time.monotonic() - began,
            )
        )

    def take_ended(self) -> tuple[LoadStats, ...]:
        """The loads that have ended since the last call."""
        ended, self._ended = self._ended, []
        return tuple(ended)

    def held_ids(self) -> Iterator[int]:
        """Blocks of nobody that a source may still write."""
        for held in self._held:
            yield from held.block_ids

    def _end(self, seq: Sequence) -> MetLoad:
        assert seq.load is not None
        load, source, began = seq.load.load, seq.load.source, seq.load.began
        load.close()
        assert seq.num_computed_tokens == load.front * self._block_size, "a load met what is not computed"
        first_block, num_blocks = load.front, load.num_loaded_blocks
        seq.load = None
        self._loading.remove(seq)
        seq.num_computed_tokens = load.end_block * self._block_size
        seq.draft = DraftState()  # what it has is of the token before the load
        load_s = time.monotonic() - began
        num_hit_tokens = seq.num_hit_tokens
        if num_blocks and not seq.has_emitted:
            self._account(seq, source, num_blocks * self._block_size, load_s)
        self._ended.append(
            LoadStats(tier=source.tier, outcome=_outcome(load), num_blocks=num_blocks, load_s=load_s)
        )
        return MetLoad(seq, first_block, load.end_block, seq.num_hit_tokens - num_hit_tokens)

    def _account(self, seq: Sequence, source: KvSource, num_tokens: int, load_s: float) -> None:
        """A sequence that was preempted meanwhile gets what it got at last."""
        seq.num_hit_tokens -= seq.loaded.num_loaded_tokens + seq.loaded.num_fetched_tokens
        seq.num_hit_tokens = min(seq.num_hit_tokens, seq.num_computed_tokens - num_tokens) + num_tokens
        is_fetched = source.tier is None
        seq.loaded = LoadedPrefix(
            num_loaded_tokens=0 if is_fetched else num_tokens,
            num_fetched_tokens=num_tokens if is_fetched else 0,
            load_s=load_s,
        )

    def _changed(self, load: KvLoad) -> None:
        """On any thread."""
        if load.needs_engine:
            self.on_change()


def _remaining_s(running: SequenceLoad) -> float:
    """As estimated from other loads, or as this one goes if that is slower. A source that has brought little
    is expected to take as long again as it has taken."""
    load = running.load
    num_open = load.num_open_blocks
    elapsed_s = time.monotonic() - running.began
    num_brought = load.num_loaded_blocks
    as_it_goes_s = elapsed_s * num_open / max(num_brought, num_open, 1)
    return max(running.source.estimate_s(num_open), as_it_goes_s)


def _outcome(load: KvLoad) -> LoadOutcome:
    if load.failure is not None:
        return LoadOutcome.FAILED
    return LoadOutcome.COMPLETE if load.front == load.first_block else LoadOutcome.MET
