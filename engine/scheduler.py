"""Decides what each step computes, and who holds which blocks. Plain Python: it knows tokens and blocks, no
tensors.

Life of a sequence:
1. add(): WAITING, no blocks.
2. schedule() admits it, by priority and then first come first served: it takes what the prefix cache has of
   it, gets the rest of the blocks of all its tokens, and is RUNNING. Where a lower tier or a peer has more of
   it, a load begins (engine.loads).
3. Each step computes a chunk of it under the token budget, until only sampling is left; then one token a
   step.
4. Out of blocks: the last running sequence in that order is preempted, WAITING again in its old place, and
   recomputed later.
5. finish(): its blocks go to the prefix cache; a keeps_blocks sequence is KEPT with them until release().

A step may be scheduled while the one before is under way: launched() counts its tokens as computed, settle()
says that they are.

The receiving side of a hand-off comes in by engine.handoffs instead of 1 to 3. remove() ends any state.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.block_pool import BlockPool
from engine.load_planner import LoadPlanner
from engine.loads import Loads, MetLoad
from engine.sequence import PrefixHashes, Sequence, SequenceStatus
from engine.tiers.block_key import BlockKey
from kvstore.block_hash import HashChain

if TYPE_CHECKING:
    from engine.tiers.tier_store import TierStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    token_budget: int  # tokens of one step
    max_running: int  # sequences that run or have all blocks of a hand-off
    mixed_budget: int | None = None  # tokens of chunks in a step that has decodes; None: what they leave
    growth_tokens: int = 128  # of further output that admission expects of each sequence
    lookahead_tokens: int = 0  # 0 or 1: a decode with drafts also has places for a step run ahead
    num_speculative_tokens: int = 0  # drafts of a decode that a step checks, at most
    max_model_len: int | None = None  # no sequence has places for more tokens; None: as many as there are

    def check(self, block_size: int) -> None:
        """ValueError when some sequence could starve."""
        if self.max_running < 1:
            raise ValueError(f"max_running must be 1 or more, got {self.max_running}")
        least = self.max_running + block_size
        if self.token_budget < least:
            raise ValueError(
                f"token_budget must be at least max_running + block_size = {least}, so that a full batch "
                f"of decodes leaves room for one block of prefill; got {self.token_budget}"
            )
        if self.mixed_budget is not None and self.mixed_budget < block_size:
            raise ValueError(
                f"mixed_budget must be at least a block of {block_size}, got {self.mixed_budget}"
            )


@dataclass(slots=True)
class ScheduledBatch:
    """Sequences of one step: first those with one token to compute, then the longer chunks. Behind its one
    token a decode may have drafts, which count as scheduled."""

    seqs: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0  # sequences with one token
    started: list[Sequence] = field(default_factory=list)  # those scheduled for the first time
    met: list[MetLoad] = field(default_factory=list)  # loads that ended well
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)

    def split(self, is_first: Callable[[Sequence], bool]) -> tuple[ScheduledBatch, ScheduledBatch]:
        """The decodes of which is_first is true, and everybody else."""
        parts = ScheduledBatch(), ScheduledBatch()
        for i, (seq, num_tokens) in enumerate(zip(self.seqs, self.num_scheduled_tokens, strict=True)):
            is_decode = i < self.num_decodes
            part = parts[0] if is_decode and is_first(seq) else parts[1]
            part.seqs.append(seq)
            part.num_scheduled_tokens.append(num_tokens)
            part.num_decodes += is_decode
        return parts

    @property
    def sampled(self) -> list[Sequence]:
        """Those whose last token is computed in this step; before it is launched."""
        pairs = zip(self.seqs, self.num_scheduled_tokens, strict=True)
        return [seq for seq, num_tokens in pairs if seq.num_remaining_tokens <= num_tokens]

    @property
    def num_prefill_tokens(self) -> int:
        return sum(self.num_scheduled_tokens[self.num_decodes :])


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        hash_chain: HashChain,
        tiers: TierStore | None = None,
    ) -> None:
        config.check(hash_chain.block_size)
        self.config = config
        self.pool = pool
        self.block_size = hash_chain.block_size
        self.loads = Loads(pool, tiers, LoadPlanner(self.block_size), self.block_size)
        self._tiers = tiers
        self.waiting: list[Sequence] = []  # by precedence, as `running` and `extending`
        self.running: list[Sequence] = []
        self.reserved: dict[int, Sequence] = {}  # RESERVED and EXTENDED
        self.extending: list[Sequence] = []  # RESERVED that wait for blocks
        self.num_extended = 0
        self.kept: dict[int, Sequence] = {}
        self._num_possible_tokens = config.max_model_len or pool.num_blocks * self.block_size
        self._hash_chain = hash_chain
        self._num_arrivals = 0

    def enlist(self, seq: Sequence) -> None:
        """The sequence is this engine's from now on, and the youngest."""
        if seq.prefix is None:
            seq.prefix = PrefixHashes(self._hash_chain, seq.cache_salt, seq.tenant)
        self._num_arrivals += 1
        seq.arrival = self._num_arrivals

    def add(self, seq: Sequence) -> None:
        self.enlist(seq)
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_precedence)

    def join(self, seq: Sequence) -> None:
        """A sequence that holds all its blocks runs from the next step on."""
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=_precedence)

    def schedule(self) -> ScheduledBatch:
        """Decodes first, then chunks of running prompts, then new sequences. Empty: nothing can be computed
        until blocks come back, a load gets on or a hand-off is committed."""
        batch = ScheduledBatch(met=self.loads.settle())
        for met in batch.met:
            self.register_blocks(met.seq, met.seq.num_computed_tokens)
        self._schedule_decodes(batch)
        if self.config.num_speculative_tokens:
            self._schedule_drafts(batch)
        budget = self.config.token_budget - batch.num_tokens
        if batch.seqs and self.config.mixed_budget is not None:
            budget = min(budget, self.config.mixed_budget)
        chunks: list[tuple[Sequence, int]] = []
        for seq in self.running:
            if seq.num_remaining_tokens > 1 and (num_tokens := self._chunk_tokens(seq, budget)):
                chunks.append((seq, num_tokens))
                budget -= num_tokens
        if not batch.num_preemptions or not (batch.seqs or chunks):
            self._admit(batch, chunks, budget)
        # A chunk of one row is a decode to the model.
        for seq, num_tokens in sorted(chunks, key=lambda chunk: chunk[1] > 1):
            batch.seqs.append(seq)
            batch.num_scheduled_tokens.append(num_tokens)
            batch.num_decodes += num_tokens == 1
        return batch

    def can_plan_ahead(self) -> bool:
        """Whether schedule() may be asked before the step under way is settled: nobody would be preempted,
        and no load waits for what is being computed."""
        if self.loads.num_loading:
            return False
        return sum(map(self._lacks_block, self.running)) <= self.pool.num_available

    def launched(self, batch: ScheduledBatch) -> list[int]:
        """The batch is on its way. Computed tokens of each of its sequences once it is done."""
        for seq, num_tokens in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
            seq.num_pending_tokens += num_tokens >= seq.num_remaining_tokens
            seq.num_computed_tokens += num_tokens
        return [seq.num_computed_tokens for seq in batch.seqs]

    def settle(self, seq: Sequence, num_computed: int, num_rejected: int = 0) -> None:
        """So many tokens of the sequence are computed, and their ids known: full blocks enter the prefix
        cache. num_rejected: drafts among them that are not what follows."""
        seq.num_computed_tokens -= num_rejected
        self.register_blocks(seq, num_computed - num_rejected)

    def register_blocks(self, seq: Sequence, num_computed: int) -> None:
        num_full = num_computed // self.block_size
        if num_full <= seq.num_registered_blocks:
            return
        assert seq.prefix is not None
        hashes = seq.prefix.upto(num_full, seq.token_ids)
        for i in range(seq.num_registered_blocks, num_full):
            block_id = seq.block_table[i]
            self.pool.register(block_id, hashes[i])
            if self._tiers is not None and self.pool.block_of(hashes[i]) == block_id:
                parent = hashes[i - 1] if i else seq.prefix.root
                self._tiers.offer(block_id, BlockKey(hashes[i], parent, i))
        seq.num_registered_blocks = num_full

    def finish(self, seq: Sequence) -> None:
        """A running sequence has its last token."""
        self.running.remove(seq)
        if seq.keeps_blocks:
            seq.status = SequenceStatus.KEPT
            self.kept[seq.seq_id] = seq
        else:
            self.pool.release(seq.block_table)

    def remove(self, seq: Sequence) -> None:
        """Whatever its state, the sequence leaves and its blocks come back."""
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        elif seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        elif seq.status is SequenceStatus.KEPT:
            del self.kept[seq.seq_id]
        else:
            self.num_extended -= seq.status is SequenceStatus.EXTENDED
            del self.reserved[seq.seq_id]
            if seq in self.extending:
                self.extending.remove(seq)
        self.loads.drop(seq)
        self.pool.release(seq.block_table)
        seq.block_table = []

    def cached_prefix(self, seq: Sequence) -> list[int]:
        """Leading blocks that the prefix cache has; never all tokens, because the last one's logits are
        needed."""
        if seq.wants_prompt_logprobs:
            return []
        assert seq.prefix is not None
        max_hits = (seq.num_tokens - 1) // self.block_size
        return self.pool.lookup(seq.prefix.upto(max_hits, seq.token_ids)[:max_hits])

    def take_prefix(self, seq: Sequence, hits: list[int]) -> None:
        self.pool.acquire(hits)
        seq.block_table = hits
        seq.num_computed_tokens = len(hits) * self.block_size
        seq.num_registered_blocks = len(hits)

    def allocate_rest(self, seq: Sequence) -> None:
        """The blocks of all its tokens that it does not hold yet."""
        table = seq.block_table
        num_new = self.num_blocks_of(seq.num_tokens) - len(table)
        after = table[-1] if table else None
        table += self.pool.allocate(num_new, after=after, room=self._growth_blocks(seq))

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def has_room(self, seq: Sequence, num_blocks: int) -> bool:
        """Whether num_blocks more may go to `seq` with everybody's expected growth left over. When nobody
        else could be hurt, what is there may be used up."""
        spare = self.pool.num_available - num_blocks
        if spare < 0:
            return False
        if not self.running and not self.num_extended:
            return True
        growth = self._growth_blocks(seq) + sum(map(self._growth_blocks, self.running))
        if self.num_extended:
            extended = (s for s in self.reserved.values() if s.status is SequenceStatus.EXTENDED)
            growth += sum(map(self._growth_blocks, extended))
        return spare >= growth

    @property
    def has_slot(self) -> bool:
        return len(self.running) + self.num_extended < self.config.max_running

    def _growth_blocks(self, seq: Sequence) -> int:
        """Blocks that the sequence is expected to take in addition; the KV of a last token is never
        computed."""
        remaining = seq.max_output_tokens - seq.num_output_tokens
        expected = seq.num_tokens + min(remaining, self.config.growth_tokens) - 1
        return max(0, self.num_blocks_of(expected) - self.num_blocks_of(seq.num_tokens))

    def _schedule_decodes(self, batch: ScheduledBatch) -> None:
        """By precedence, so that a victim of preemption is never one already scheduled."""
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            if self._decodes(seq) and self._grow(seq, batch):
                batch.seqs.append(seq)
            # _grow may have preempted seq itself; then the next one has its place
            i += i < len(self.running) and self.running[i] is seq
        batch.num_decodes = len(batch.seqs)
        batch.num_scheduled_tokens = [1] * batch.num_decodes

    def _schedule_drafts(self, batch: ScheduledBatch) -> None:
        """Drafts take what nobody else wants: of the budget what leaves a prompt its block, and free
        blocks."""
        config = self.config
        spare = config.token_budget - self.block_size - len(self.running)
        num_ahead = config.lookahead_tokens * (1 + config.num_speculative_tokens)
        for i, seq in enumerate(batch.seqs):
            num_remaining = seq.max_output_tokens - seq.num_output_tokens
            num_drafts = max(0, min(len(seq.draft.token_ids), spare, num_remaining - 1))
            # The place behind the last draft is for the draft layer's row of the token that comes there.
            num_wanted = min(
                num_drafts + 1 + num_ahead, num_remaining - 1, self._num_possible_tokens - seq.num_tokens
            )
            num_places = self._grow_for_drafts(seq, num_wanted)
            num_drafts = min(num_drafts, num_places)
            batch.num_scheduled_tokens[i] += num_drafts
            spare -= num_drafts

    def _grow_for_drafts(self, seq: Sequence, num_tokens: int) -> int:
        """Places that it has behind its tokens, wanted num_tokens."""
        table = seq.block_table
        num_missing = self.num_blocks_of(seq.num_tokens + num_tokens) - len(table)
        num_new = min(num_missing, self.pool.num_available)
        if num_new > 0 and not seq.keeps_blocks:
            table += self.pool.allocate(num_new, after=table[-1])
        return len(table) * self.block_size - seq.num_tokens

    def _grow(self, seq: Sequence, batch: ScheduledBatch) -> bool:
        """A block for the newest token, if need be at the cost of the last one. False: that was `seq`."""
        if not self._lacks_block(seq):
            return True
        while not self.pool.num_available:
            victim = next((s for s in reversed(self.running) if not s.keeps_blocks), seq)
            assert not victim.keeps_blocks, "a keeps_blocks sequence has all its blocks from the start"
            self._preempt(victim)
            batch.num_preemptions += 1
            if victim is seq:
                return False
        seq.block_table.extend(self.pool.allocate(1, after=seq.block_table[-1]))
        return True

    def _decodes(self, seq: Sequence) -> bool:
        """One token to compute, unless that one is pending and the last."""
        num_pending = seq.num_pending_tokens
        num_tokens = len(seq.token_ids) + num_pending  # asked of every sequence in every step: few calls
        if num_tokens - seq.num_computed_tokens != 1:
            return False
        return not num_pending or (
            num_tokens - seq.num_prompt_tokens < seq.max_output_tokens
            and num_tokens < self._num_possible_tokens
        )

    def _lacks_block(self, seq: Sequence) -> bool:
        """A decode has no place for its newest token."""
        num_ahead = 0 if seq.keeps_blocks else self.config.lookahead_tokens
        num_wanted = len(seq.token_ids) + seq.num_pending_tokens + num_ahead
        return len(seq.block_table) * self.block_size < num_wanted and self._decodes(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.loads.drop(seq)
        self.pool.release(seq.block_table)
        seq.restart()
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_precedence)

    def _chunk_tokens(self, seq: Sequence, budget: int) -> int:
        """As much as fits, to the end of a block unless it is the end of the tokens. 0: nothing now."""
        if seq.load is not None:
            return self.loads.take_chunk(seq, budget)
        if seq.num_remaining_tokens <= budget:
            return seq.num_remaining_tokens
        end = (seq.num_computed_tokens + budget) // self.block_size * self.block_size
        return max(0, end - seq.num_computed_tokens)

    def _admit(self, batch: ScheduledBatch, chunks: list[tuple[Sequence, int]], budget: int) -> None:
        while self.waiting and self.has_slot:
            seq = self.waiting[0]
            if self.extending and self.extending[0].precedence < seq.precedence:
                return
            hits = self.cached_prefix(seq)
            num_new = self.num_blocks_of(seq.num_tokens) - len(hits)
            num_computed = len(hits) * self.block_size
            if not self._fits_budget(seq.num_tokens - num_computed, budget):
                return
            if not self.has_room(seq, num_new + self.pool.num_unused(hits)):
                return
            del self.waiting[0]
            source = self.loads.choose(seq, len(hits))
            self.take_prefix(seq, hits)
            self.allocate_rest(seq)
            self.join(seq)
            if not seq.has_started:
                seq.has_started = True
                seq.num_hit_tokens = num_computed
                batch.started.append(seq)
            if source is not None:
                self.loads.begin(seq, source)
            if num_tokens := self._chunk_tokens(seq, budget):
                chunks.append((seq, num_tokens))
                budget -= num_tokens

    def _fits_budget(self, num_remaining: int, budget: int) -> bool:
        """Whether a sequence that starts at a block boundary can compute anything."""
        return min(num_remaining, self.block_size) <= budget


def _precedence(seq: Sequence) -> tuple[int, int]:
    return seq.precedence
