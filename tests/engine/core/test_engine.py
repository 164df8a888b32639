from __future__ import annotations

from typing import Any

import pytest

from engine.engine import Engine
from engine.outputs import FinishReason, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.core.engine_driver import generate, greedy, run
from tests.fakes.fake_model import EOS_TOKEN_ID, VOCAB_SIZE, build_fake_engine, expected_tokens

PROMPTS = [[5], [1, 2, 3, 4], list(range(3, 40)), [9] * 17]


def last_output(engine: Engine, seq: Sequence) -> SequenceOutput:
    engine.add(seq)
    _, steps = run(engine)
    return steps[-1].outputs[-1]


@pytest.mark.parametrize(
    "engine_options",
    [
        {},
        {"token_budget": 21},
        {"num_blocks": 22, "growth_tokens": 1},
        {"block_size": 1, "num_blocks": 256},
        {"max_running": 1},
    ],
    ids=["plain", "chunked", "preempted", "block_of_one", "one_at_a_time"],
)
def test_tokens_are_those_of_the_model_alone(engine_options: dict[str, Any]) -> None:
    engine = build_fake_engine(**engine_options)
    assert generate(engine, PROMPTS, 20) == [expected_tokens(prompt, 20) for prompt in PROMPTS]


def test_few_blocks_do_preempt() -> None:
    engine = build_fake_engine(num_blocks=22, growth_tokens=1)
    for i, prompt_ids in enumerate(PROMPTS):
        engine.add(Sequence(i, prompt_ids, greedy(20)))
    _, steps = run(engine)
    assert sum(step.stats.num_preemptions for step in steps) > 0


def test_a_second_turn_hits_the_first_one_with_its_answer() -> None:
    engine = build_fake_engine()
    first = list(range(1, 11))
    (answer,) = generate(engine, [first], 10)
    second = first + answer + [3, 4, 5]
    engine.add(Sequence(2, second, greedy(5)))
    tokens, steps = run(engine)
    assert tokens[2] == expected_tokens(second, 5)
    # the KV of the answer's last token was never computed: 19 of 20 tokens are, 16 of them in full blocks
    assert steps[0].outputs[0].num_hit_tokens == 16
    assert (steps[0].stats.num_hit_tokens, steps[0].stats.num_queried_tokens) == (16, 23)


def test_an_end_token_finishes_with_stop_and_is_in_the_output() -> None:
    prompt_ids = _prompt_that_ends(after=3)
    output = last_output(
        build_fake_engine(), Sequence(1, prompt_ids, SamplingParams(temperature=0, max_tokens=50))
    )
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == (EOS_TOKEN_ID,)


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    prompt_ids = _prompt_that_ends(after=3)
    (tokens,) = generate(build_fake_engine(), [prompt_ids], 8)
    assert EOS_TOKEN_ID in tokens
    assert len(tokens) == 8


def test_min_tokens_keeps_the_end_token_from_being_drawn() -> None:
    prompt_ids = _prompt_that_ends(after=3)
    sampling = SamplingParams(temperature=0, max_tokens=50, min_tokens=6)
    engine = build_fake_engine()
    engine.add(Sequence(1, prompt_ids, sampling))
    tokens, _ = run(engine)
    assert EOS_TOKEN_ID not in tokens[1][:6]
    assert tokens[1][:2] == expected_tokens(prompt_ids, 2)


def test_a_stop_token_finishes_with_stop() -> None:
    tokens = expected_tokens([1, 2, 3], 4)
    sampling = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=50, stop_token_ids=frozenset({tokens[3]})
    )
    output = last_output(build_fake_engine(), Sequence(1, [1, 2, 3], sampling))
    assert (output.finish_reason, output.token_ids) == (FinishReason.STOP, (tokens[3],))


def test_the_longest_context_finishes_with_length() -> None:
    engine = build_fake_engine(max_model_len=12)
    engine.add(Sequence(1, [1] * 8, greedy(100)))
    tokens, steps = run(engine)
    assert len(tokens[1]) == 4
    assert steps[-1].outputs[0].finish_reason is FinishReason.LENGTH


def test_tokens_generated_elsewhere_continue_and_count_against_max_tokens() -> None:
    engine = build_fake_engine()
    tokens = expected_tokens([1, 2, 3], 10)
    engine.add(Sequence(1, [1, 2, 3], greedy(10), output_ids=tokens[:6]))
    assert run(engine)[0][1] == tokens[6:]


def test_a_sampled_continuation_does_not_depend_on_where_and_with_whom_it_runs() -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True)
    engine = build_fake_engine()
    engine.add(Sequence(1, [1, 2, 3], sampling))
    tokens = run(engine)[0][1]
    other = build_fake_engine(block_size=8)
    for i, prompt_ids in enumerate(PROMPTS):
        other.add(Sequence(10 + i, prompt_ids, SamplingParams(seed=i, max_tokens=9, ignore_eos=True)))
    other.add(Sequence(1, [1, 2, 3], sampling, output_ids=tokens[:5]))
    assert run(other)[0][1] == tokens[5:]


def test_logprobs_come_with_each_token_and_prompt_logprobs_with_the_first() -> None:
    engine = build_fake_engine(token_budget=20)
    prompt_ids = list(range(1, 31))
    sampling = SamplingParams(temperature=0, max_tokens=3, num_logprobs=2, num_prompt_logprobs=1)
    engine.add(Sequence(1, prompt_ids, sampling))
    outputs = [output for step in run(engine)[1] for output in step.outputs]
    assert [entry.token_id for entry in outputs[0].prompt_logprobs] == prompt_ids[1:]
    assert all(len(entry.top_token_ids) == 1 for entry in outputs[0].prompt_logprobs)
    assert not outputs[1].prompt_logprobs
    for output in outputs:
        (entry,) = output.logprobs
        assert entry.token_id == output.token_ids[0] == entry.top_token_ids[0]
        assert entry.logprob == entry.top_logprobs[0] > entry.top_logprobs[1]


def test_prompt_logprobs_survive_a_preemption_once_each() -> None:
    engine = build_fake_engine(num_blocks=12, growth_tokens=1, token_budget=20, max_running=4)
    engine.add(Sequence(1, [7] * 4, greedy(30)))
    prompt_ids = list(range(1, 31))
    sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, num_prompt_logprobs=0)
    engine.add(Sequence(2, prompt_ids, sampling))
    outputs = [output for step in run(engine)[1] for output in step.outputs if output.seq_id == 2]
    assert [entry.token_id for entry in outputs[0].prompt_logprobs] == prompt_ids[1:]


@pytest.mark.parametrize(
    ("prompt_ids", "options", "complaint"),
    [
        ([], {}, "empty"),
        ([1] * 256, {}, "longest context"),
        ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE}"),
        ([1, -1], {}, "token id -1"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": frozenset({VOCAB_SIZE})}, "stop token"),
    ],
)
def test_what_can_never_run_is_refused(
    prompt_ids: list[int], options: dict[str, Any], complaint: str
) -> None:
    engine = build_fake_engine()
    with pytest.raises(ValueError, match=complaint):
        engine.add(Sequence(1, prompt_ids, SamplingParams(**options)))
    assert not engine.has_work
    engine.check_integrity()


def test_a_sequence_id_in_use_is_refused() -> None:
    engine = build_fake_engine()
    engine.add(Sequence(1, [1], greedy(2)))
    with pytest.raises(ValueError, match="in use"):
        engine.add(Sequence(1, [2], greedy(2)))


def test_output_that_is_complete_already_is_refused() -> None:
    with pytest.raises(ValueError, match="all 2 output tokens"):
        build_fake_engine().add(Sequence(1, [1], greedy(2), output_ids=[3, 4]))


def test_a_context_that_could_outgrow_the_cache_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="needs more KV cache"):
        build_fake_engine(num_blocks=4, block_size=4, max_model_len=17)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_abort_frees_all_blocks_at_once(num_steps: int) -> None:
    engine = build_fake_engine(token_budget=20)
    engine.add(Sequence(1, list(range(40)), greedy(10)))
    for _ in range(num_steps):
        engine.step()
    engine.abort(1)
    engine.abort(1)
    assert not engine.has_work
    assert engine.load().num_used_blocks == 0
    engine.check_integrity()


def test_stats_count_what_the_step_did() -> None:
    engine = build_fake_engine(token_budget=20)
    engine.add(Sequence(1, list(range(24)), greedy(4)))
    stats = engine.step().stats
    assert (stats.num_prefill_tokens, stats.num_decode_tokens, stats.num_waiting_tokens) == (20, 0, 4)
    assert (stats.num_used_blocks, stats.num_free_blocks, stats.num_cached_blocks) == (6, 58, 0)
    engine.step()
    stats = engine.step().stats
    assert (stats.num_prefill_tokens, stats.num_decode_tokens, stats.num_running) == (0, 1, 1)


def test_block_events_tell_the_hashes_of_full_blocks() -> None:
    engine = build_fake_engine()
    engine.add(Sequence(1, list(range(10)), greedy(3), cache_salt="tenant"))
    events = engine.step().block_events
    assert [block_hash for block_hash, _ in events.placed] == engine.hash_chain.hashes(
        list(range(10)), "tenant"
    )
    assert events.removed == ()


def _prompt_that_ends(after: int) -> list[int]:
    """A prompt whose greedy continuation has the end token at index `after` first."""
    for first in range(1, VOCAB_SIZE):
        for second in range(1, VOCAB_SIZE):
            tokens = expected_tokens([first, second], after + 1)
            if tokens.index(EOS_TOKEN_ID) == after if EOS_TOKEN_ID in tokens else False:
                return [first, second]
    raise AssertionError("the fake model never ends")
