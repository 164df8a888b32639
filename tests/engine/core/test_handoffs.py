from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.kv_announcer import KvAnnouncer
from engine.outputs import FinishReason, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.core.engine_driver import CopyingListener, generate, greedy, hand_off, run
from tests.fakes.fake_model import NUM_LAYERS, build_fake_engine, expected_tokens

PROMPT = list(range(1, 31))
FIRST = TokenLogprobs(expected_tokens(PROMPT, 1)[0], 0.0)


def reserve_all(
    engine: Engine, seq_id: int, prompt_ids: list[int], max_tokens: int = 8, priority: int = 0
) -> list[int]:
    """Block ids, or nothing when there was no room."""
    granted: list[int] = []
    engine.reserve(Sequence(seq_id, prompt_ids, greedy(max_tokens), priority=priority))
    engine.extend(seq_id, granted.extend)
    return granted


def test_a_handed_over_sequence_goes_on_as_if_nothing_had_happened() -> None:
    sender, receiver = build_fake_engine(token_budget=20), build_fake_engine()
    _, first = hand_off(sender, receiver, 1, PROMPT, 12)
    tokens, _ = run(receiver)
    assert [*first.token_ids, *tokens[1]] == expected_tokens(PROMPT, 12)
    for engine in (sender, receiver):
        engine.check_integrity()
        assert engine.load().num_used_blocks == 0


def test_blocks_that_the_receiver_holds_are_not_needed_again() -> None:
    sender, receiver = build_fake_engine(), build_fake_engine()
    generate(receiver, [PROMPT[:20]], 1)
    listener, first = hand_off(sender, receiver, 1, PROMPT, 6)
    assert listener.num_held_blocks == 5
    assert [*first.token_ids, *run(receiver)[0][1]] == expected_tokens(PROMPT, 6)


def test_the_last_block_is_received_even_if_the_receiver_has_all_of_the_prompt() -> None:
    receiver = build_fake_engine()
    generate(receiver, [PROMPT[:28]], 1)
    assert receiver.reserve(Sequence(1, PROMPT[:28], greedy(4))) == 6


def test_a_handed_over_prompt_is_in_the_receivers_prefix_cache() -> None:
    sender, receiver = build_fake_engine(), build_fake_engine()
    hand_off(sender, receiver, 1, PROMPT, 4)
    run(receiver)
    assert receiver.reserve(Sequence(2, PROMPT, greedy(4))) == 7


def test_each_block_is_announced_once_for_each_layer() -> None:
    sender, receiver = build_fake_engine(token_budget=20), build_fake_engine()
    generate(sender, [PROMPT[:9]], 1)
    listener, _ = hand_off(sender, receiver, 1, PROMPT, 4)
    assert listener.num_started == 1
    assert listener.num_hit_tokens == 8
    covered = [
        (layer, block)
        for first_layer, num_layers, first_block, num_blocks in listener.announced
        for layer in range(first_layer, first_layer + num_layers)
        for block in range(first_block, first_block + num_blocks)
    ]
    assert sorted(covered) == [(layer, block) for layer in range(NUM_LAYERS) for block in range(8)]
    assert listener.announced[0] == (0, NUM_LAYERS, 0, 2)  # the cached prefix comes first


def test_announcements_are_grouped_by_layers_up_to_a_size_and_split_by_blocks_beyond() -> None:
    # 32 bytes a block and layer.
    sender, receiver = build_fake_engine(), build_fake_engine()

    def announced(group_bytes: int, seq_id: int) -> list[tuple[int, int, int, int]]:
        sender._announcer = KvAnnouncer(sender.kv_cache, group_bytes=group_bytes)
        prompt_ids = [seq_id] * 32
        listener, _ = hand_off(sender, receiver, seq_id, prompt_ids, 2)
        return listener.announced

    assert announced(8 * 32 * 2, 1) == [(0, 2, 0, 8), (2, 1, 0, 8)]
    assert announced(3 * 32, 2) == [
        (layer, 1, first, min(3, 8 - first)) for layer in range(3) for first in (0, 3, 6)
    ]


def test_a_keeps_blocks_sequence_holds_its_blocks_until_release() -> None:
    engine = build_fake_engine()
    engine.add(Sequence(1, PROMPT, greedy(50), keeps_blocks=True))
    tokens, steps = run(engine)
    assert tokens[1] == expected_tokens(PROMPT, 1)
    assert steps[-1].outputs[0].finish_reason is FinishReason.LENGTH
    assert engine.load().num_used_blocks == 8
    engine.release(1)
    engine.release(1)
    assert (engine.load().num_used_blocks, engine.load().num_cached_blocks) == (0, 7)
    engine.check_integrity()


def test_release_before_the_end_is_refused() -> None:
    engine = build_fake_engine(token_budget=20)
    engine.add(Sequence(1, PROMPT, greedy(2), keeps_blocks=True))
    engine.step()
    with pytest.raises(ValueError, match="must be KEPT, is RUNNING"):
        engine.release(1)


def test_commit_after_abort_is_rejected() -> None:
    engine = build_fake_engine()
    reserve_all(engine, 1, PROMPT)
    engine.abort(1)
    with pytest.raises(ValueError, match="must be EXTENDED, is unknown"):
        engine.commit(1, FIRST)
    assert engine.load().num_used_blocks == 0


def test_commit_without_blocks_is_rejected() -> None:
    engine = build_fake_engine()
    engine.reserve(Sequence(1, PROMPT, greedy(4)))
    with pytest.raises(ValueError, match="must be EXTENDED, is RESERVED"):
        engine.commit(1, FIRST)


def test_a_first_token_outside_the_vocabulary_is_rejected() -> None:
    engine = build_fake_engine()
    reserve_all(engine, 1, PROMPT)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.commit(1, TokenLogprobs(10_000, 0.0))


def test_a_first_token_that_is_the_last_ends_the_sequence_in_commit() -> None:
    engine = build_fake_engine()
    reserve_all(engine, 1, PROMPT, max_tokens=1)
    output = engine.commit(1, FIRST)
    assert output is not None
    assert output.finish_reason is FinishReason.LENGTH
    assert not engine.has_work
    assert engine.load().num_used_blocks == 0


def test_an_end_token_as_first_token_ends_the_sequence_in_commit() -> None:
    engine = build_fake_engine()
    engine.reserve(Sequence(1, PROMPT, SamplingParams(max_tokens=9)))
    engine.extend(1, lambda block_ids: None)
    output = engine.commit(1, TokenLogprobs(0, 0.0))
    assert output is not None
    assert output.finish_reason is FinishReason.STOP


def test_a_reservation_waits_for_room_and_gets_it_from_an_abort() -> None:
    engine = build_fake_engine(num_blocks=12)
    assert len(reserve_all(engine, 1, PROMPT)) == 8
    waiting = reserve_all(engine, 2, PROMPT[::-1])
    assert not waiting
    assert not engine.has_work
    engine.abort(1)
    assert len(waiting) == 8


def test_a_reservation_aborted_while_it_waits_is_not_called_back() -> None:
    engine = build_fake_engine(num_blocks=12)
    reserve_all(engine, 1, PROMPT)
    waiting = reserve_all(engine, 2, PROMPT[::-1])
    engine.abort(2)
    engine.abort(1)
    assert not waiting
    engine.check_integrity()


def test_reservations_are_served_in_order_also_if_a_later_one_would_fit() -> None:
    engine = build_fake_engine(num_blocks=12)
    reserve_all(engine, 1, PROMPT)
    second = reserve_all(engine, 2, PROMPT[::-1])
    third = reserve_all(engine, 3, [1, 2, 3], max_tokens=1)
    assert not third
    engine.abort(2)
    assert third
    assert not second


def test_reservations_and_running_sequences_together_stay_within_max_running() -> None:
    engine = build_fake_engine(max_running=2)
    engine.add(Sequence(1, [1, 2, 3], greedy(5)))
    engine.step()
    assert reserve_all(engine, 2, [4, 5, 6])
    third = reserve_all(engine, 3, [7, 8, 9])
    assert not third
    run(engine)
    assert third


def test_a_full_decode_worker_lets_hand_offs_wait_for_the_growth_of_what_runs() -> None:
    engine = build_fake_engine(num_blocks=16, growth_tokens=16)
    engine.add(Sequence(1, [3] * 16, greedy(40)))
    engine.step()
    assert engine.load().num_free_blocks == 12
    waiting = reserve_all(engine, 2, PROMPT, max_tokens=16)  # 8 blocks and 4 of growth; 1 grows by 4 itself
    assert not waiting
    _, steps = run(engine)
    assert len(waiting) == 8
    assert sum(step.stats.num_preemptions for step in steps) == 0


def test_a_waiting_sequence_and_a_reservation_are_served_in_order_of_arrival() -> None:
    engine = build_fake_engine(num_blocks=12, max_running=2)
    reserve_all(engine, 1, PROMPT)
    engine.add(Sequence(2, PROMPT[::-1], greedy(2)))
    third = reserve_all(engine, 3, [1, 2], max_tokens=1)
    engine.step()
    assert not third
    assert not engine.has_work  # 2 waits for blocks that only an abort or a commit can bring
    engine.abort(1)
    assert engine.has_work
    engine.step()
    assert third


def test_reservations_and_waiting_sequences_are_served_by_priority() -> None:
    engine = build_fake_engine(num_blocks=12, max_running=1)
    first = reserve_all(engine, 1, PROMPT)
    behind = reserve_all(engine, 2, PROMPT[:8], priority=1)
    engine.add(Sequence(3, PROMPT[::-1], greedy(1)))
    ahead = reserve_all(engine, 4, PROMPT[:9], priority=-1)
    assert first and not behind and not ahead
    engine.abort(1)
    engine.step()
    assert ahead and not behind
    engine.abort(4)
    assert [output.seq_id for output in engine.step().outputs] == [3]
    engine.step()
    assert behind


def test_held_prefixes_cannot_block_each_other() -> None:
    engine = build_fake_engine(num_blocks=12, max_model_len=48)
    first, second = list(range(1, 21)), list(range(101, 121))
    generate(engine, [first, second], 1)
    engine.reserve(Sequence(1, first * 2, greedy(2)))
    engine.reserve(Sequence(2, second * 2, greedy(2)))
    granted: list[int] = []
    engine.extend(1, granted.extend)
    assert len(granted) == 10


def test_two_hand_offs_of_one_prompt_share_its_blocks_on_the_sender() -> None:
    sender, receiver = build_fake_engine(), build_fake_engine()
    first, _ = hand_off(sender, receiver, 1, PROMPT, 3)
    second, _ = hand_off(sender, receiver, 2, PROMPT, 3)
    assert (first.num_hit_tokens, second.num_hit_tokens) == (0, 28)


def test_a_listener_without_kept_blocks_is_refused() -> None:
    engine = build_fake_engine()
    listener = CopyingListener(engine, engine, 0)
    with pytest.raises(ValueError, match="keep its blocks"):
        engine.add(Sequence(1, PROMPT, greedy(2), kv_listener=listener))


def test_a_preempted_sequence_that_was_handed_over_is_recomputed_by_the_receiver() -> None:
    sender = build_fake_engine()
    receiver = build_fake_engine(num_blocks=16, growth_tokens=1)
    firsts = {}
    for seq_id, prompt_ids in ((1, PROMPT[:12]), (2, PROMPT[12:26])):
        _, first = hand_off(sender, receiver, seq_id, prompt_ids, 30)
        firsts[seq_id] = first.token_ids[0]
    tokens, steps = run(receiver)
    assert sum(step.stats.num_preemptions for step in steps) > 0
    assert [firsts[1], *tokens[1]] == expected_tokens(PROMPT[:12], 30)
    assert [firsts[2], *tokens[2]] == expected_tokens(PROMPT[12:26], 30)
