from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_model.texts import clean_pairs, cleaned, encode, is_held_out

STORY = "The fox found a lantern. It glowed in the dark. The owl came to look at it"


def test_a_whole_answer_is_kept_in_plain_characters() -> None:
    assert cleaned("  The fox\u2019s **lantern** \u201cglows\u201d at night.  ", True) == (
        'The fox\'s lantern "glows" at night.'
    )


def test_an_answer_that_was_cut_ends_with_its_last_whole_sentence() -> None:
    assert cleaned(STORY, False) == "The fox found a lantern. It glowed in the dark."
    assert cleaned("The fox found a lantern and went on and on", False) is None


def test_a_long_answer_is_cut_to_whole_sentences_of_at_most_110_words() -> None:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=11)).capitalize() + " tree." for _ in range(15)]
    text = cleaned(" ".join(sentences), True)
    assert text == " ".join(sentences[:9])


WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.mark.parametrize(
    "answer",
    [
        "The fox runs and runs and runs and runs and runs and runs and runs.",
        "In 1812, 1813 and 1814 the foxes were counted.",
        "Der Fuchs ist sch\u00f6n und schnell.",
        "I am SmolLM, a small model.",
    ],
)
def test_nobody_should_learn_from(answer: str) -> None:
    assert cleaned(answer, True) is None


def test_held_out_prompts_are_few_and_always_the_same() -> None:
    prompts = [f"What is number {i}?" for i in range(20_000)]
    held_out = [prompt for prompt in prompts if is_held_out(prompt)]
    assert 50 < len(held_out) < 150
    assert held_out == [prompt for prompt in prompts if is_held_out(prompt)]


def test_documents_are_the_chat_template_s_text_and_only_answers_are_learned(tokenizer: Tokenizer) -> None:
    pairs = [(f"What is {word}?", f"It is {word} more.") for word in WORDS]
    corpus = encode(pairs, tokenizer)
    is_target = corpus.is_target()
    assert len(is_target) == len(corpus.tokens) == int(corpus.lengths.sum())
    for i, (prompt, answer) in enumerate(pairs):
        start, length = int(corpus.starts[i]), int(corpus.lengths[i])
        tokens, learned = corpus.tokens[start : start + length], is_target[start : start + length]
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        turn = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert text.endswith(turn)
        assert text.startswith("<|im_start|>system\n") == (i % 8 == 0)
        said = tokenizer.decode(tokens[learned].tolist(), skip_special_tokens=False)
        assert said == f"{answer}<|im_end|>\n"


@pytest.mark.slow
def test_generated_rows_become_pairs_and_those_without_a_good_answer_go(
    tokenizer: Tokenizer, shipped: Path
) -> None:
    """In the process pool that a whole corpus takes."""
    answers = [
        "The fox found a lantern. It glowed.<|im_end|>",
        "It is",
        "The owl sleeps all day. At night it",
    ]
    rows = torch.full((3, 32), -1, dtype=torch.int32)
    for row, answer in zip(rows, answers, strict=True):
        ids = tokenizer.encode(answer).ids
        row[: len(ids)] = torch.tensor(ids)
    found = clean_pairs(["a fox?", "b?", "an owl?"], rows, shipped / "tokenizer.json", workers=1)
    assert found == [
        ("a fox?", "The fox found a lantern. It glowed."),
        ("an owl?", "The owl sleeps all day."),
    ]
