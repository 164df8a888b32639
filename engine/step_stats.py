"""Counts of one step and of the present load."""

from __future__ import annotations

from dataclasses import dataclass

from engine.launch import StepResult
from engine.outputs import SpeculationStats, StepStats, TierStats
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineLoad:
    num_running: int
    num_waiting: int  # added but not scheduled, preempted, or in hand-off
    num_waiting_tokens: int  # still to compute here, for the sequences not yet past their prompt
    num_free_blocks: int  # free and not cached
    num_cached_blocks: int  # nobody's, kept for prefix hits
    num_used_blocks: int
    num_total_blocks: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """As in StepStats."""

    step_s: float
    ended_at: float
    listened_s: float
    kept_device_waiting: bool


def measure_load(scheduler: Scheduler) -> EngineLoad:
    pool = scheduler.pool
    return EngineLoad(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting) + len(scheduler.reserved),
        num_waiting_tokens=_num_waiting_tokens(scheduler),
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_used_blocks=pool.num_used,
        num_total_blocks=pool.num_blocks,
    )


def build_stats(
    scheduler: Scheduler,
    batch: ScheduledBatch,
    times: StepTimes,
    *,
    is_idle_step: bool,
    result: StepResult,
    tiers: tuple[TierStats, ...] = (),
) -> StepStats:
    """After the step."""
    pool = scheduler.pool
    return StepStats(
        num_prefill_tokens=batch.num_prefill_tokens,
        num_decode_tokens=batch.num_decodes,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_waiting_tokens=_num_waiting_tokens(scheduler),
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_used_blocks=pool.num_used,
        num_preemptions=batch.num_preemptions,
        num_hit_tokens=sum(seq.num_hit_tokens for seq in batch.started)
        + sum(met.num_hit_tokens for met in batch.met),
        num_queried_tokens=sum(seq.num_prompt_tokens for seq in batch.started),
        step_s=times.step_s,
        ended_at=times.ended_at,
        listened_s=times.listened_s,
        kept_device_waiting=times.kept_device_waiting,
        is_idle_step=is_idle_step,
        expert_load=result.expert_load,
        grammar=result.grammar,
        speculation=_count_drafts(result, scheduler.config.num_speculative_tokens),
        tiers=tiers,
        loads=scheduler.loads.take_ended(),
    )


def _count_drafts(result: StepResult, most: int) -> SpeculationStats:
    checked = [new for new in result.new if new.draft_ids]
    return SpeculationStats(
        num_drafts=len(checked),
        num_draft_tokens=sum(len(new.draft_ids) for new in checked),
        num_accepted_at=tuple(sum(new.num_accepted > place for new in checked) for place in range(most)),
    )


def _num_waiting_tokens(scheduler: Scheduler) -> int:
    prefilling = (seq for seq in scheduler.running if seq.num_remaining_tokens > 1)
    return sum(map(_remaining, scheduler.waiting)) + sum(map(_remaining, prefilling))


def _remaining(seq: Sequence) -> int:
    return seq.num_remaining_tokens
