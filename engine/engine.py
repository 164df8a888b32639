"""One step after another: schedule, launch, read and judge the new tokens. Where tokens can stay on the
device the next step is launched before those of this one are read.

Belongs to one thread (engine.engine_thread); every method is quick except step(). The same engine prefills,
decodes, and takes both ends of a hand-off:

    sending side     add(keeps_blocks=True, kv_listener) ... output of the first token ... release()
    receiving side   reserve() -> extend() -> [blocks are written] -> commit() ... outputs ...
    either           abort(), at any time

An expected refusal is a return value or a wait; ValueError is the caller's mistake. Any other exception, and
every one out of step(), ends the engine.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from engine.block_pool import BlockPool
from engine.device_share import DeviceShare
from engine.ep.ep_group import EpGroup
from engine.handoffs import Handoffs, OnReady
from engine.kv_announcer import KvAnnouncer
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.kv_outbox import KvOutbox
from engine.launch import Launch, StepResult
from engine.outputs import FinishReason, SequenceOutput, StepOutput, TokenLogprobs
from engine.phase_times import PhaseTimes
from engine.pins import PinnedRun, Pins
from engine.runner import Runner
from engine.scheduler import ScheduledBatch, Scheduler, SchedulerConfig
from engine.sequence import Sequence, SequenceStatus
from engine.speculation.draft_state import DraftState
from engine.speculation.handed_draft import HandedDraft, pack_draft
from engine.speculation.verification import NewTokens
from engine.step_clock import StepClock, Work
from engine.step_stats import EngineLoad, StepTimes, build_stats, measure_load
from engine.tiers.tier_store import LowerTiers, TierStore
from kvstore.block_hash import BlockHash, HashChain

Listen = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    max_model_len: int  # tokens of prompt and output
    vocab_size: int
    eos_token_ids: frozenset[int]


def _extremes(token_ids: array[int]) -> tuple[int, int]:
    values = np.frombuffer(token_ids, dtype=np.int64)
    return int(values.min()), int(values.max())


@dataclass(slots=True)
class _Step:
    """From its schedule until its tokens are read."""

    batch: ScheduledBatch
    began: float  # monotonic
    launch: Launch | None  # None: there was nothing to compute
    num_computed: list[int]  # tokens of each sequence once it is done
    listened_s: float = 0.0  # before the step behind it was planned
    kept_device_waiting: bool = False  # it ended before that one was launched

    @property
    def work(self) -> Work:
        return self.batch.num_decodes, self.batch.num_prefill_tokens


class Engine:
    def __init__(
        self,
        runner: Runner,
        kv_cache: KvCache,
        limits: EngineLimits,
        scheduler_config: SchedulerConfig,
        ep: EpGroup | None = None,
        tiers: LowerTiers | None = None,
    ) -> None:
        """Owns the tiers. ValueError when a sequence of max_model_len tokens would not fit in the cache."""
        layout = kv_cache.layout
        capacity = kv_cache.num_blocks * layout.block_size
        if limits.max_model_len > capacity:
            raise ValueError(
                f"max_model_len {limits.max_model_len} needs more KV cache than there is: "
                f"{kv_cache.num_blocks} blocks hold {capacity} tokens"
            )
        self.kv_cache = kv_cache
        self.hash_chain = HashChain(model_fingerprint=layout.model_fingerprint, block_size=layout.block_size)
        self.max_model_len = limits.max_model_len
        self.max_running = scheduler_config.max_running
        self.vocab_size = limits.vocab_size
        self.eos_token_ids = limits.eos_token_ids
        self.start_times = PhaseTimes()
        self.device_share = DeviceShare(1.0)
        self.ep = ep if ep is not None and ep.size > 1 else None
        self._runner = runner
        if self.ep is not None:
            runner.join_group(self.ep.recount)
        self._outbox: KvOutbox | None = None
        self._announcer = KvAnnouncer(kv_cache)
        self._pool = BlockPool(kv_cache.num_blocks)
        self._tiers = TierStore(self._pool, kv_cache, tiers or LowerTiers())
        self._pins = Pins(self._tiers.places, kv_cache)
        scheduler_config = replace(scheduler_config, max_model_len=limits.max_model_len)
        self._scheduler = Scheduler(scheduler_config, self._pool, self.hash_chain, self._tiers)
        self._handoffs = Handoffs(self._scheduler)
        self._seqs: dict[int, Sequence] = {}
        self._next: _Step | None = None  # launched before the tokens of the last one were read
        self._clock = StepClock()
        self._last_read = 0.0  # monotonic: when the last step was done
        self._is_stalled = False  # the last step found nothing to compute, and nothing has changed since
        self._has_news = bool(self._tiers.places.hashes())  # for the next step; set by any thread
        self._on_news: Callable[[], None] = lambda: None
        self._tiers.on_change = self._scheduler.loads.on_change = self._note_news

    def send_through(self, outbox: KvOutbox) -> None:
        """Owns it from now on: KV of hand-offs from here leaves through it. Before the first sequence."""
        assert self._outbox is None and not self._seqs
        self._outbox = outbox
        self._announcer = KvAnnouncer(self.kv_cache, outbox)
        outbox.on_failure = self._note_news

    @property
    def kv_layout(self) -> KvLayout:
        return self.kv_cache.layout

    @property
    def host_cache(self) -> KvCache | None:
        """Where the blocks of the host tier are; None without one."""
        host = self._tiers.places.host
        return None if host is None else host.blocks

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.num_blocks

    @property
    def has_work(self) -> bool:
        """Whether step() can get anywhere: not while all sequences wait for a hand-off, a load or blocks, and
        not while it rests."""
        if self._next is not None:
            return True
        if self.device_share.rest_s:
            return False
        if self._has_news or self.next_work_s == 0.0:
            return True
        scheduler = self._scheduler
        return bool(scheduler.running or scheduler.waiting) and not self._is_stalled

    @property
    def next_work_s(self) -> float | None:
        """Seconds until step() should be called though nobody has said anything; None: no need."""
        if rest_s := self.device_share.rest_s:
            return rest_s
        recheck_at = self._scheduler.loads.recheck_at
        return None if recheck_at is None else max(0.0, recheck_at - time.monotonic())

    def subscribe(self, on_news: Callable[[], None]) -> None:
        """on_news() from any thread: a load or a background write got on, so has_work may be true now."""
        self._on_news = on_news

    def close(self) -> None:
        """Ends the threads of the tiers; what they are doing is finished, and so is what the device does. No
        step may follow. Idempotent."""
        step, self._next = self._next, None
        if step is not None and step.launch is not None:
            with suppress(RuntimeError):  # of a device that failed; nobody reads these tokens
                step.launch.collect()
        self._tiers.close()
        if self._outbox is not None:
            self._outbox.close()

    def add(self, seq: Sequence) -> None:
        """ValueError for what can never run."""
        self._take(seq)
        self._scheduler.add(seq)

    def abort(self, seq_id: int) -> None:
        """End the sequence in any state; its blocks are free on return, but for those that a load is writing
        at this moment. No output follows. Idempotent."""
        seq = self._seqs.pop(seq_id, None)
        if seq is not None:
            self._scheduler.remove(seq)
            self._handoffs.forget(seq)
            self._announcer.forget(seq)
            self._blocks_came_back()

    def abort_all(self) -> None:
        for seq_id in list(self._seqs):
            self.abort(seq_id)

    def reserve(self, seq: Sequence) -> int:
        """Number of leading blocks held in the cache already; never all. ValueError for what can never
        run."""
        self._take(seq)
        return self._handoffs.reserve(seq)

    def extend(self, seq_id: int, on_ready: OnReady) -> None:
        """on_ready(block ids of the whole prompt) as soon as there is room for it and for the growth of
        everybody, by precedence: in this call, or in a later one, on the engine thread. Not after
        abort()."""
        seq = self._expect(seq_id, SequenceStatus.RESERVED)
        self._handoffs.extend(seq, on_ready)

    def commit(
        self, seq_id: int, first_token: TokenLogprobs, draft: HandedDraft | None = None
    ) -> SequenceOutput | None:
        """All blocks of the prompt are written, the first token is known, and perhaps a draft of the next
        one. The sequence runs from the next step on, or the returned output says that this token was its
        last."""
        seq = self._expect(seq_id, SequenceStatus.EXTENDED)
        if not 0 <= first_token.token_id < self.vocab_size:
            raise ValueError(
                f"first token {first_token.token_id} is not in the vocabulary of {self.vocab_size}"
            )
        state = DraftState() if draft is None else self._runner.unpack_draft(draft, seq.num_tokens + 1)
        self._handoffs.commit(seq, first_token.token_id, state)
        self._is_stalled = False
        finish_reason = seq.finish_reason_after(self.eos_token_ids, self.max_model_len)
        if finish_reason is None:
            return None
        self._finish(seq)
        logprobs = (first_token,) if seq.sampling.num_logprobs is not None else ()
        self._blocks_came_back()
        return SequenceOutput(
            seq_id=seq_id,
            token_ids=(first_token.token_id,),
            logprobs=logprobs,
            finish_reason=finish_reason,
            num_hit_tokens=seq.num_hit_tokens,
        )

    def release(self, seq_id: int) -> None:
        """A finished keeps_blocks sequence gives its blocks to the prefix cache. Idempotent, also after
        abort()."""
        seq = self._seqs.get(seq_id)
        if seq is not None:
            self._expect(seq_id, SequenceStatus.KEPT)
            self.abort(seq_id)

    def pin(self, hashes: list[BlockHash]) -> PinnedRun:
        """The longest leading run of these blocks that is here, in any tier, as far as pins are allowed.
        Until unpin() none of them is evicted or reused."""
        return self._pins.pin(hashes)

    def unpin(self, pin_id: int) -> None:
        """Idempotent."""
        if self._pins.unpin(pin_id):
            self._blocks_came_back()

    def step(self, listen: Listen | None = None) -> StepOutput:
        """The tokens of one batch, or with expert parallelism of one idle step when other ranks have tokens
        and this one none. Where that is possible the batch behind it is under way then.

        listen(seconds) may call every other method for so long; who is added or committed then is in the
        batch behind."""
        step, self._next = self._next, None
        if step is None:
            step = self._start()
        if step.launch is not None and step.launch.is_open and self._may_launch_ahead():
            self._launch_ahead(step, step.launch, listen)
        return self._finish_step(step)

    def _may_launch_ahead(self) -> bool:
        return self.ep is None and self.device_share.is_whole and self._scheduler.can_plan_ahead()

    def _launch_ahead(self, step: _Step, launch: Launch, listen: Listen | None) -> None:
        """Behind a step that runs."""
        plan_at = now = time.monotonic()
        if listen is not None and not launch.is_done:
            plan_at = max(now, self._clock.plan_at(step.work, max(step.began, self._last_read)))
            if plan_at > now:
                step.listened_s = plan_at - now
                listen(step.listened_s)
            if not self._may_launch_ahead():
                return
        ahead = self._start()
        step.kept_device_waiting = launch.is_done
        self._clock.planned(plan_at, was_late=step.kept_device_waiting and plan_at > now)
        if ahead.launch is not None or ahead.batch.met:
            self._next = ahead

    def _start(self) -> _Step:
        began = time.monotonic()
        self._has_news = False
        self._tiers.poll()
        if self._outbox is not None:
            self._outbox.poll()
        batch = self._scheduler.schedule()
        self._start_sequences(batch, began)
        self._handoffs.grant()
        self._is_stalled = not batch.seqs
        must_run = bool(batch.seqs)
        if self.ep is not None:
            must_run = self.ep.agree(self._runner.num_rows(batch))
        launch = self._runner.launch(batch, self._announcer.layer_done(batch)) if must_run else None
        return _Step(batch, began, launch, self._scheduler.launched(batch))

    def _finish_step(self, step: _Step) -> StepOutput:
        batch = step.batch
        result = StepResult() if step.launch is None else step.launch.collect()
        now = time.monotonic()
        step_s = now - max(step.began, self._last_read)  # the device is done with one step after the other
        self._last_read = now
        if step.launch is not None and step.launch.device_s is not None:
            self._clock.ended(step.work, step.launch.device_s)
        if batch.num_prefill_tokens and self.ep is None:
            self.device_share.spent(step_s)
        self._scheduler.loads.planner.observe_step(batch.num_prefill_tokens, step_s)
        news = [new for new in result.new if self._runs(new.seq)]  # others have ended meanwhile
        judged = [self._append(new) for new in news]
        num_rejected = {new.seq: new.num_rejected for new in news}
        for seq, num_computed in zip(batch.seqs, step.num_computed, strict=True):
            if self._runs(seq):
                self._scheduler.settle(seq, num_computed, num_rejected.get(seq, 0))
        if step.launch is not None:
            self._tiers.pump()
        outputs = [
            self._take_tokens(new, finish_reason, now)
            for new, finish_reason in zip(news, judged, strict=True)
        ]
        if any(output.finish_reason for output in outputs):
            self._blocks_came_back()
        if batch.seqs:
            self._is_stalled = False
        stats = build_stats(
            self._scheduler,
            batch,
            StepTimes(step_s, now, step.listened_s, step.kept_device_waiting),
            is_idle_step=step.launch is not None and not batch.seqs,
            result=result,
            tiers=self._tiers.stats(),
        )
        if not self._seqs:
            num_held = len({*self._pins.block_ids(), *self._scheduler.loads.held_ids()})
            assert self._pool.num_used == num_held, f"{self._pool.num_used - num_held} blocks are lost"
        return StepOutput(outputs=outputs, stats=stats, block_events=self._tiers.take_events())

    def load(self) -> EngineLoad:
        return measure_load(self._scheduler)

    def cached_hashes(self) -> list[bytes]:
        """Everything cached in any tier: what the block events so far add up to, once step() has given them
        all."""
        return list(self._tiers.places.hashes())

    def check_integrity(self) -> None:
        """AssertionError when free + cached + used = total in a tier, or a reference count, does not hold."""
        references = Counter((*self._pins.block_ids(), *self._scheduler.loads.held_ids()))
        references.update(b for seq in self._seqs.values() for b in seq.block_table)
        self._pool.check_integrity(references)
        self._tiers.places.check_integrity()
        if self._outbox is not None:
            self._outbox.check_integrity([seq.outbox_slots for seq in self._seqs.values()])
        scheduler = self._scheduler
        listed = [
            *scheduler.waiting,
            *scheduler.running,
            *scheduler.reserved.values(),
            *scheduler.kept.values(),
        ]
        assert sorted(seq.seq_id for seq in listed) == sorted(self._seqs)
        extended = [s for s in scheduler.reserved.values() if s.status is SequenceStatus.EXTENDED]
        assert scheduler.num_extended == len(extended)

    def _take(self, seq: Sequence) -> None:
        if seq.seq_id in self._seqs:
            raise ValueError(f"sequence id {seq.seq_id} is in use")
        self._check(seq)
        seq.times.added = time.monotonic()
        self._seqs[seq.seq_id] = seq
        self._is_stalled = False

    def _check(self, seq: Sequence) -> None:
        if not seq.num_prompt_tokens:
            raise ValueError("the prompt is empty")
        if seq.num_tokens >= self.max_model_len:
            raise ValueError(
                f"prompt and output so far are {seq.num_tokens} tokens; the longest context is "
                f"{self.max_model_len} tokens, at least one of them new"
            )
        if seq.num_output_tokens >= seq.max_output_tokens:
            raise ValueError(f"all {seq.max_output_tokens} output tokens are there already")
        if (seq.sampling.grammar is None) is not (seq.matcher is None):
            raise ValueError("a sequence has a matcher exactly when its sampling has a grammar")
        if seq.kv_listener is not None and not seq.keeps_blocks:
            raise ValueError("a sequence with a KV listener must keep its blocks")
        for token_ids, what in (
            (_extremes(seq.token_ids), "token id"),
            (seq.sampling.logit_bias, "logit_bias for token id"),
            (seq.sampling.stop_token_ids, "stop token id"),
            (seq.sampling.allowed_token_ids, "allowed token id"),
            *((word, "token id of a bad word") for word in seq.sampling.bad_words),
        ):
            if token_ids and not (0 <= min(token_ids) and max(token_ids) < self.vocab_size):
                worst = max(token_ids) if max(token_ids) >= self.vocab_size else min(token_ids)
                raise ValueError(f"{what} {worst} is not in the vocabulary of {self.vocab_size} tokens")

    def _expect(self, seq_id: int, status: SequenceStatus) -> Sequence:
        seq = self._seqs.get(seq_id)
        if seq is None or seq.status is not status:
            found = "unknown" if seq is None else seq.status.name
            raise ValueError(f"sequence {seq_id} must be {status.name}, is {found}")
        return seq

    def _start_sequences(self, batch: ScheduledBatch, now: float) -> None:
        for seq in batch.started:
            seq.times.scheduled = now
            self._announcer.announce_start(seq)
        for met in batch.met:
            self._announcer.announce_blocks(met.seq, met.first_block, met.end_block)

    def _append(self, new: NewTokens) -> FinishReason | None:
        """The sequence gets its new tokens, up to one that ends it; `new` keeps no others."""
        seq = new.seq
        seq.num_pending_tokens -= 1
        if seq.matcher is not None and seq.matcher.error is not None:
            new.cut(0)
            return FinishReason.ABORTED
        for i, token_id in enumerate(new.token_ids):
            seq.token_ids.append(token_id)
            finish_reason = seq.finish_reason_after(self.eos_token_ids, self.max_model_len)
            if finish_reason is not None:
                new.cut(i + 1)
                return finish_reason
        return None

    def _take_tokens(self, new: NewTokens, finish_reason: FinishReason | None, now: float) -> SequenceOutput:
        seq = new.seq
        if finish_reason is not None:
            self._finish(seq)
        if not new.token_ids:
            assert seq.matcher is not None
            return SequenceOutput(
                seq_id=seq.seq_id, token_ids=(), finish_reason=finish_reason, error=seq.matcher.error
            )
        token_ids, logprobs = tuple(new.token_ids), tuple(new.logprobs)
        if seq.has_emitted:
            return SequenceOutput(
                seq_id=seq.seq_id, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason
            )
        seq.has_emitted = True
        assert seq.times.scheduled is not None
        return SequenceOutput(
            seq_id=seq.seq_id,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            num_hit_tokens=seq.num_hit_tokens,
            queue_s=seq.times.scheduled - seq.times.added,
            prefill_s=now - seq.times.scheduled,
            prompt_logprobs=tuple(seq.prompt_logprobs),
            num_loaded_tokens=seq.loaded.num_loaded_tokens,
            num_fetched_tokens=seq.loaded.num_fetched_tokens,
            load_s=seq.loaded.load_s,
            draft=pack_draft(seq.draft) if seq.keeps_blocks else None,
        )

    def _runs(self, seq: Sequence) -> bool:
        return seq.status is SequenceStatus.RUNNING and self._seqs.get(seq.seq_id) is seq

    def _note_news(self) -> None:
        self._has_news = True
        self._on_news()

    def _finish(self, seq: Sequence) -> None:
        self._scheduler.finish(seq)
        if not seq.keeps_blocks:
            del self._seqs[seq.seq_id]

    def _blocks_came_back(self) -> None:
        self._is_stalled = False
        self._handoffs.grant()
