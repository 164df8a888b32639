"""Whatever the engine does to a sequence: its greedy tokens are those of transformers, in float32."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine, EngineLimits
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence
from tests.engine.core.engine_driver import generate, greedy, hand_off, run

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 100)


@dataclass(frozen=True)
class Golden:
    model_dir: Path
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v2", "llama"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    model_dir = tmp_path_factory.mktemp(request.param) / "model"
    make_random_checkpoint(model_dir, request.param)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = random.Random(5)
    prompts = [[generator.randrange(3, 4096) for _ in range(n)] for n in PROMPT_LENGTHS]
    generate_ = partial(model.generate, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
    tokens = []
    for prompt_ids in prompts:
        ids = torch.tensor([prompt_ids])
        output = generate_(ids, attention_mask=torch.ones_like(ids), pad_token_id=0)
        tokens.append(output[0, len(prompt_ids) :].tolist())
    assert len({token for row in tokens for token in row}) > 3 * len(prompts)
    return Golden(model_dir, prompts, tokens)


def build(golden: Golden, num_blocks: int = 80, token_budget: int = 512, growth_tokens: int = 24) -> Engine:
    built = build_engine(
        EngineConfig(
            model_dir=golden.model_dir,
            dtype="float32",
            num_blocks=num_blocks,
            token_budget=token_budget,
            max_running=8,
        )
    )
    limits = EngineLimits(
        max_model_len=built.max_model_len, vocab_size=built.vocab_size, eos_token_ids=built.eos_token_ids
    )
    config = SchedulerConfig(token_budget=token_budget, max_running=8, growth_tokens=growth_tokens)
    return Engine(built._runner, built.kv_cache, limits, config)


@pytest.mark.parametrize("token_budget", [512, 33], ids=["whole", "chunked"])
def test_a_mixed_batch(golden: Golden, token_budget: int) -> None:
    assert generate(build(golden, token_budget=token_budget), golden.prompts, NUM_TOKENS) == golden.tokens


def test_one_sequence_after_another_and_again_out_of_the_prefix_cache(golden: Golden) -> None:
    engine = build(golden)
    for round_ in range(2):
        for i, prompt_ids in enumerate(golden.prompts):
            engine.add(Sequence(10 * round_ + i, prompt_ids, greedy(NUM_TOKENS)))
            tokens, steps = run(engine)
            assert tokens[10 * round_ + i] == golden.tokens[i]
            num_hit_tokens = steps[0].stats.num_hit_tokens
            assert num_hit_tokens == (round_ and (len(prompt_ids) - 1) // 16 * 16)


def test_a_second_turn_on_top_of_a_generated_answer(golden: Golden) -> None:
    engine = build(golden)
    prompt_ids, tokens = golden.prompts[4], golden.tokens[4]
    generate(engine, [prompt_ids], 12)
    engine.add(Sequence(2, prompt_ids + tokens[:12], greedy(NUM_TOKENS - 12)))
    rest, steps = run(engine)
    assert steps[0].stats.num_hit_tokens == 48
    assert rest[2] == tokens[12:]


def test_preempted_sequences(golden: Golden) -> None:
    engine = build(golden, num_blocks=10, growth_tokens=1)
    for i, prompt_ids in enumerate(golden.prompts):
        engine.add(Sequence(i, prompt_ids, greedy(NUM_TOKENS)))
    tokens, steps = run(engine)
    assert sum(step.stats.num_preemptions for step in steps) > 0
    assert [tokens[i] for i in range(len(golden.prompts))] == golden.tokens


def test_hand_offs_between_two_engines_beside_a_local_sequence(golden: Golden) -> None:
    sender, receiver = build(golden, token_budget=48), build(golden)
    generate(receiver, [golden.prompts[5][:40]], 1, first_id=50)
    receiver.add(Sequence(99, golden.prompts[2], greedy(NUM_TOKENS)))
    tokens = {99: list(receiver.step().outputs[0].token_ids)}
    for i, prompt_ids in enumerate(golden.prompts):
        listener, first = hand_off(sender, receiver, i, prompt_ids, NUM_TOKENS)
        assert listener.num_held_blocks == (2 if i == 5 else 0)
        tokens[i] = list(first.token_ids)
        for output in receiver.step().outputs:
            tokens.setdefault(output.seq_id, []).extend(output.token_ids)
    for seq_id, rest in run(receiver)[0].items():
        tokens[seq_id] += rest
    assert [tokens[i] for i in range(len(golden.prompts))] == golden.tokens
    assert tokens[99] == golden.tokens[2]


def test_greedy_rows_beside_sampled_ones(golden: Golden) -> None:
    engine = build(golden)
    for i, prompt_ids in enumerate(golden.prompts):
        engine.add(Sequence(i, prompt_ids, greedy(NUM_TOKENS)))
        sampling = SamplingParams(
            temperature=0.8, top_p=0.9, seed=i, max_tokens=9, ignore_eos=True, repetition_penalty=1.1
        )
        if i < 2:
            engine.add(Sequence(100 + i, prompt_ids, sampling))
    tokens, _ = run(engine)
    assert [tokens[i] for i in range(len(golden.prompts))] == golden.tokens


def test_prompt_logprobs_are_those_of_transformers(golden: Golden) -> None:
    prompt_ids = golden.prompts[5]
    model = AutoModelForCausalLM.from_pretrained(golden.model_dir, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt_ids])).logits[0].log_softmax(1)
    engine = build(golden, token_budget=48)
    sampling = SamplingParams(temperature=0, max_tokens=1, num_logprobs=0, num_prompt_logprobs=0)
    engine.add(Sequence(1, prompt_ids, sampling))
    output = run(engine)[1][-1].outputs[0]
    found = [entry.logprob for entry in (*output.prompt_logprobs, *output.logprobs)]
    tokens = [*prompt_ids[1:], output.token_ids[0]]
    assert found == pytest.approx([float(expected[i, token]) for i, token in enumerate(tokens)], abs=1e-3)
