from __future__ import annotations

from typing import Any

import pytest

from engine.block_pool import BlockPool
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch, Scheduler, SchedulerConfig
from engine.sequence import Sequence
from kvstore.block_hash import HashChain

BLOCK_SIZE = 4


def build(
    num_blocks: int = 64,
    token_budget: int = 16,
    max_running: int = 8,
    growth_tokens: int = 8,
    mixed_budget: int | None = None,
) -> Scheduler:
    config = SchedulerConfig(
        token_budget=token_budget,
        max_running=max_running,
        growth_tokens=growth_tokens,
        mixed_budget=mixed_budget,
    )
    chain = HashChain(model_fingerprint="test", block_size=BLOCK_SIZE)
    return Scheduler(config, BlockPool(num_blocks), chain)


def sequence(seq_id: int, num_tokens: int, max_tokens: int = 100, **fields: Any) -> Sequence:
    prompt_ids = [seq_id * 1000 + i for i in range(num_tokens)]
    return Sequence(seq_id, prompt_ids, SamplingParams(max_tokens=max_tokens), **fields)


def step(scheduler: Scheduler) -> ScheduledBatch:
    """Schedules, and gives a token to each sequence that is due."""
    batch = scheduler.schedule()
    compute(scheduler, batch)
    return batch


def compute(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    for seq, num_computed in zip(batch.seqs, scheduler.launched(batch), strict=True):
        if seq.num_pending_tokens:
            seq.num_pending_tokens = 0
            seq.token_ids.append(7)
            seq.has_emitted = True
        scheduler.settle(seq, num_computed)


def plan(batch: ScheduledBatch) -> list[tuple[int, int]]:
    return [(seq.seq_id, count) for seq, count in zip(batch.seqs, batch.num_scheduled_tokens, strict=True)]


def test_beside_decodes_chunks_have_a_budget_of_their_own() -> None:
    scheduler = build(token_budget=16, mixed_budget=8)
    scheduler.add(sequence(1, 15))
    assert plan(step(scheduler)) == [(1, 15)]
    scheduler.add(sequence(2, 11))
    assert [plan(step(scheduler)) for _ in range(2)] == [[(1, 1), (2, 8)], [(1, 1), (2, 3)]]


def test_a_long_prompt_is_computed_in_chunks_that_end_at_blocks() -> None:
    scheduler = build(token_budget=15)
    scheduler.add(sequence(1, 33))
    assert [plan(step(scheduler)) for _ in range(3)] == [[(1, 12)], [(1, 12)], [(1, 9)]]


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    scheduler = build(token_budget=16)
    scheduler.add(sequence(1, 3))
    step(scheduler)
    scheduler.add(sequence(2, 40))
    batch = scheduler.schedule()
    assert plan(batch) == [(1, 1), (2, 12)]
    assert batch.num_decodes == 1
    assert batch.num_tokens <= 16


def test_several_prompts_share_one_step() -> None:
    scheduler = build(token_budget=16)
    for seq_id in (1, 2, 3):
        scheduler.add(sequence(seq_id, 6))
    assert plan(step(scheduler)) == [(1, 6), (2, 6), (3, 4)]


def test_a_chunk_of_one_token_is_placed_among_the_decodes() -> None:
    scheduler = build()
    scheduler.add(sequence(1, 6))
    scheduler.add(sequence(2, 1))
    batch = scheduler.schedule()
    assert plan(batch) == [(2, 1), (1, 6)]
    assert batch.num_decodes == 1


def test_no_more_than_max_running_sequences_run() -> None:
    scheduler = build(max_running=2)
    for seq_id in (1, 2, 3):
        scheduler.add(sequence(seq_id, 2))
    step(scheduler)
    assert [seq.seq_id for seq in scheduler.running] == [1, 2]
    scheduler.finish(scheduler.running[0])
    step(scheduler)
    assert [seq.seq_id for seq in scheduler.running] == [2, 3]


def test_those_that_wait_are_admitted_by_priority_and_then_by_arrival() -> None:
    scheduler = build(max_running=1)
    scheduler.add(sequence(1, 2, priority=50))
    step(scheduler)
    for seq_id, priority in ((2, 1), (3, 0), (4, -7), (5, 0), (6, 1)):
        scheduler.add(sequence(seq_id, 2, priority=priority))
    order = []
    while scheduler.running:
        order.append(scheduler.running[0].seq_id)
        scheduler.finish(scheduler.running[0])
        step(scheduler)
    assert order == [1, 4, 3, 5, 2, 6]  # what runs already is left alone


def test_a_prompt_of_higher_priority_gets_the_budget_first() -> None:
    scheduler = build(token_budget=16)
    scheduler.add(sequence(1, 60, priority=5))
    step(scheduler)
    scheduler.add(sequence(2, 14, priority=0))
    assert plan(step(scheduler)) == [(1, 16)]  # the prompt that was begun first had the whole step
    scheduler.finish(scheduler.running[0])
    scheduler.add(sequence(3, 60, priority=5))
    assert plan(step(scheduler)) == [(2, 14)]
    assert plan(step(scheduler)) == [(2, 1), (3, 12)]


def test_out_of_blocks_the_lowest_priority_is_preempted_though_it_came_first() -> None:
    scheduler = build(num_blocks=4, growth_tokens=1)
    scheduler.add(sequence(1, 7, priority=1))
    step(scheduler)
    scheduler.add(sequence(2, 7))
    step(scheduler)
    while not (batch := step(scheduler)).num_preemptions:
        pass
    assert plan(batch) == [(2, 1)]
    assert [seq.seq_id for seq in scheduler.waiting] == [1]


def test_a_large_sequence_at_the_head_is_not_overtaken() -> None:
    scheduler = build(num_blocks=10)
    scheduler.add(sequence(1, 16))
    step(scheduler)
    scheduler.add(sequence(2, 30))
    scheduler.add(sequence(3, 2))
    step(scheduler)
    assert [seq.seq_id for seq in scheduler.running] == [1]


def test_admission_leaves_room_for_the_expected_growth_of_all() -> None:
    scheduler = build(num_blocks=6, growth_tokens=9)
    scheduler.add(sequence(1, 4))
    scheduler.add(sequence(2, 4))
    step(scheduler)
    # 1 + 2 blocks of growth each: two sequences use exactly the 6 blocks, so neither is preempted
    assert len(scheduler.running) == 2
    tight = build(num_blocks=5, growth_tokens=9)
    tight.add(sequence(1, 4))
    tight.add(sequence(2, 4))
    step(tight)
    assert len(tight.running) == 1


def test_growth_beyond_max_tokens_is_not_expected() -> None:
    scheduler = build(num_blocks=2, growth_tokens=100)
    scheduler.add(sequence(1, 4, max_tokens=1))
    scheduler.add(sequence(2, 4, max_tokens=1))
    step(scheduler)
    assert len(scheduler.running) == 2


def test_the_youngest_is_preempted_and_comes_back_before_those_that_came_later() -> None:
    scheduler = build(num_blocks=4, growth_tokens=1)
    scheduler.add(sequence(1, 7))
    scheduler.add(sequence(2, 7))
    step(scheduler)
    step(scheduler)
    scheduler.add(sequence(3, 2))
    batch = step(scheduler)
    assert batch.num_preemptions == 1
    assert plan(batch) == [(1, 1)]
    assert [seq.seq_id for seq in scheduler.waiting] == [2, 3]
    assert scheduler.waiting[0].num_computed_tokens == 0


def test_a_preempted_sequence_finds_its_own_blocks_in_the_prefix_cache() -> None:
    scheduler = build(num_blocks=6, growth_tokens=1)
    scheduler.add(sequence(1, 11))
    scheduler.add(sequence(2, 11))
    while not step(scheduler).num_preemptions:
        pass
    scheduler.finish(scheduler.running[0])
    batch = step(scheduler)
    assert plan(batch)[0][0] == 2
    assert scheduler.running[0].num_hit_tokens == 0  # counts the first admission only
    assert batch.num_scheduled_tokens[0] < 11


def test_a_keeps_blocks_sequence_is_never_preempted() -> None:
    scheduler = build(num_blocks=5, growth_tokens=1, token_budget=12)
    scheduler.add(sequence(1, 7))
    step(scheduler)
    scheduler.add(sequence(2, 12, keeps_blocks=True))
    batch = scheduler.schedule()
    assert plan(batch) == [(1, 1), (2, 8)]
    compute(scheduler, batch)
    batch = step(scheduler)
    assert batch.num_preemptions == 1
    assert [seq.seq_id for seq in scheduler.waiting] == [1]
    assert plan(batch) == [(2, 4)]


def test_generated_blocks_enter_the_prefix_cache_too() -> None:
    scheduler = build()
    scheduler.add(sequence(1, 4))
    for _ in range(6):
        step(scheduler)
    seq = scheduler.running[0]
    token_ids = seq.token_ids.tolist()
    scheduler.finish(seq)
    scheduler.add(Sequence(2, token_ids, SamplingParams()))
    batch = scheduler.schedule()
    assert batch.seqs[0].num_hit_tokens == 8
    assert len(token_ids) == 10


def test_the_last_token_is_computed_even_if_everything_is_cached() -> None:
    scheduler = build()
    scheduler.add(sequence(1, 8))
    step(scheduler)
    scheduler.finish(scheduler.running[0])
    scheduler.add(sequence(1, 8))
    assert plan(scheduler.schedule()) == [(1, 4)]


def test_equal_prompts_with_another_salt_share_nothing() -> None:
    scheduler = build()
    scheduler.add(Sequence(1, list(range(9)), SamplingParams(), cache_salt="a"))
    step(scheduler)
    scheduler.add(Sequence(2, list(range(9)), SamplingParams(), cache_salt="b"))
    scheduler.add(Sequence(3, list(range(9)), SamplingParams(), cache_salt="a"))
    scheduler.schedule()
    hits = {seq.seq_id: seq.num_hit_tokens for seq in scheduler.running}
    assert hits == {1: 0, 2: 0, 3: 8}


def test_prompt_logprobs_take_no_prefix_hit() -> None:
    scheduler = build()
    scheduler.add(sequence(1, 9))
    step(scheduler)
    scheduler.add(Sequence(2, [1000 + i for i in range(9)], SamplingParams(num_prompt_logprobs=0)))
    batch = scheduler.schedule()
    assert plan(batch) == [(1, 1), (2, 9)]


@pytest.mark.parametrize(("token_budget", "max_running"), [(11, 8), (100, 0)])
def test_a_budget_that_would_starve_somebody_is_refused(token_budget: int, max_running: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        build(token_budget=token_budget, max_running=max_running)
