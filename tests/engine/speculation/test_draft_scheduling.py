"""Drafts take what nobody else wants."""

from __future__ import annotations

from engine.block_pool import BlockPool
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence
from engine.speculation.draft_state import DraftState
from kvstore.block_hash import HashChain

BLOCK_SIZE = 4


def build(num_blocks: int = 64, token_budget: int = 16, num_speculative_tokens: int = 2) -> Scheduler:
    config = SchedulerConfig(
        token_budget=token_budget,
        max_running=4,
        growth_tokens=1,
        num_speculative_tokens=num_speculative_tokens,
    )
    return Scheduler(
        config, BlockPool(num_blocks), HashChain(model_fingerprint="test", block_size=BLOCK_SIZE)
    )


def decoding(scheduler: Scheduler, *lengths: int, max_tokens: int = 50) -> list[Sequence]:
    """Sequences with a token to compute and two drafts behind it."""
    seqs = []
    for seq_id, num_tokens in enumerate(lengths):
        prompt_ids = [100 * seq_id + i for i in range(num_tokens)]
        seqs.append(Sequence(seq_id, prompt_ids, SamplingParams(max_tokens=max_tokens)))
        scheduler.add(seqs[-1])
    batch = scheduler.schedule()
    for seq, num_computed in zip(batch.seqs, scheduler.launched(batch), strict=True):
        assert seq.num_pending_tokens == 1
        seq.num_pending_tokens = 0
        seq.token_ids.append(7)
        scheduler.settle(seq, num_computed)
    assert batch.seqs == seqs
    for seq in seqs:
        seq.draft = DraftState(token_ids=[8, 9], is_ahead=True)
    return seqs


def test_drafts_are_scheduled_with_places_for_them_and_for_the_next_one() -> None:
    scheduler = build()
    [seq] = decoding(scheduler, 4)
    batch = scheduler.schedule()
    assert (batch.num_decodes, batch.num_scheduled_tokens) == (1, [3])
    assert batch.num_prefill_tokens == 0
    assert len(seq.block_table) * BLOCK_SIZE >= 4 + 1 + 2 + 1


def test_rejected_drafts_are_not_computed_tokens() -> None:
    scheduler = build()
    [seq] = decoding(scheduler, 6)
    batch = scheduler.schedule()
    [num_computed] = scheduler.launched(batch)
    seq.token_ids.extend([8, 3])  # the first draft was right, the second was not
    seq.num_pending_tokens = 0
    scheduler.settle(seq, num_computed, num_rejected=1)
    assert seq.num_computed_tokens == 8
    assert seq.num_remaining_tokens == 1
    assert seq.num_registered_blocks == 2


def test_the_budget_leaves_a_prompt_its_block() -> None:
    scheduler = build(token_budget=9)
    decoding(scheduler, 2, 2, 2)
    batch = scheduler.schedule()
    assert batch.num_scheduled_tokens == [3, 1, 1]
    assert batch.num_tokens + BLOCK_SIZE <= 9


def test_no_sequence_is_preempted_for_a_draft() -> None:
    scheduler = build(num_blocks=4)
    first, second = decoding(scheduler, 6, 6)
    assert scheduler.pool.num_available == 0
    batch = scheduler.schedule()
    assert batch.num_preemptions == 0
    assert batch.num_scheduled_tokens == [2, 2]  # one place each is left behind the last token
    assert len(first.block_table) == len(second.block_table) == 2


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    scheduler = build()
    [seq] = decoding(scheduler, 3, max_tokens=2)
    batch = scheduler.schedule()
    assert batch.num_scheduled_tokens == [1]
    assert len(seq.block_table) == 1
