from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.checkpoint.random_checkpoint import make_random_checkpoint
from tools.demo_model.teacher import SamplingPlan, SlotSampler, Teacher

END = 2
NEW_TOKENS = 12
# The likeliest token is the only one that min_p leaves, whatever the noise.
GREEDY = SamplingPlan(num_slots=3, max_new_tokens=NEW_TOKENS, temperature=1.0, min_p=1.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose head is its embedding, as the teacher's is. Embeddings are small beside what the
    layers add, or every token would be followed by itself."""
    directory = tmp_path_factory.mktemp("teacher") / "llama"
    make_random_checkpoint(directory, "llama")
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    [file] = directory.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] *= 0.02
    save_file(tensors, file, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def teacher(directory: Path) -> Teacher:
    return Teacher(directory, torch.device("cpu"))


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Callable[[list[int]], list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    return generate


def random_prompts(count: int, common: int = 0) -> list[list[int]]:
    chance = random.Random(count)
    head = [chance.randrange(3, 4096) for _ in range(common)]
    lengths = [chance.randrange(1, 20) for _ in range(count)]
    return [head + [chance.randrange(3, 4096) for _ in range(length)] for length in lengths]


def padded(tokens: list[int]) -> list[int]:
    return tokens + [-1] * (NEW_TOKENS - len(tokens))


@pytest.mark.parametrize("common", [0, 5], ids=["apart", "with a common beginning"])
def test_more_prompts_than_slots_are_all_answered_as_by_transformers(
    teacher: Teacher, oracle: Callable[[list[int]], list[int]], common: int
) -> None:
    prompts = random_prompts(10, common)
    answers = SlotSampler(teacher, prompts, GREEDY).run(lambda: True)
    assert answers.tolist() == [padded(oracle(prompt)) for prompt in prompts]
    assert min(len(set(answer)) for answer in answers.tolist()) > 2
    assert len(set(map(tuple, answers.tolist()))) == len(prompts)


def test_an_ending_token_ends_an_answer_and_frees_its_slot(
    teacher: Teacher, oracle: Callable[[list[int]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(8)
    whole = [oracle(prompt) for prompt in prompts]
    ending = next(token for token in whole[0][2:] if token not in whole[0][:2])
    monkeypatch.setattr("tools.demo_model.teacher._END", ending)
    expected = [tokens[: tokens.index(ending) + 1] if ending in tokens else tokens for tokens in whole]
    assert 2 < len(expected[0]) <= NEW_TOKENS
    answers = SlotSampler(teacher, prompts, GREEDY).run(lambda: True)
    assert answers.tolist() == [padded(tokens) for tokens in expected]


def test_when_time_is_up_what_was_generated_is_given(
    teacher: Teacher, oracle: Callable[[list[int]], list[int]]
) -> None:
    looks = iter([True, False])
    prompts = random_prompts(40)
    answers = SlotSampler(teacher, prompts, GREEDY).run(lambda: next(looks)).tolist()
    begun = [row for row in answers if row[0] >= 0]
    assert 0 < len(begun) < len(prompts)
    assert begun[0] == padded(oracle(prompts[0]))
    assert all(row == [-1] * NEW_TOKENS for row in answers[len(begun) :])


def test_tokens_below_min_p_are_never_drawn_and_others_by_their_probability() -> None:
    from tools.demo_model.teacher import _choose

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = _choose(logits, noise, 1.0, 0.2).bincount(minlength=4) / len(logits)
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015, rtol=0)
