from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from tools.demo_model.prompts import (
    PromptTables,
    draw_openings,
    draw_prompts,
    is_everyday,
    is_good_answer,
    load_tables,
    plural,
    with_article,
)

TABLES = load_tables()
WRONG_ARTICLE_OR_MARK = re.compile(r"\b[Aa]n? (a|an|the)\b|\ba [aeio]\w|\ban [^aeiouh]|!(\S| [a-z])")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", "cats"),
        ("fox", "foxes"),
        ("peach", "peaches"),
        ("octopus", "octopuses"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("butterfly", "butterflies"),
        ("tomato", "tomatoes"),
        ("garlic!", "garlic"),
    ],
)
def test_plurals(word: str, expected: str) -> None:
    assert plural(word) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("university", "a university"),
        ("honest", "an honest"),
        ("spinach!", "spinach"),
        ("the moon", "the moon"),
        ("an old map", "an old map"),
    ],
)
def test_articles(word: str, expected: str) -> None:
    assert with_article(word) == expected


def test_every_word_that_needs_an_irregular_plural_has_one() -> None:
    words = {word for kind in TABLES.topics.values() for word in kind}
    assert {"mouse", "goose", "wolf", "butterfly", "cherry", "strawberry"} <= words
    pluralised = {match for text in TABLES.templates for match in re.findall(r"\{([a-z]+)s\}", text)}
    for kind in pluralised & TABLES.topics.keys():
        wrong = [w for w in TABLES.topics[kind] if re.search(r"([^aeiou]ys|ooses|ouses|lfs|tos)$", plural(w))]
        assert wrong == []


def test_every_template_can_be_filled_and_becomes_an_everyday_prompt() -> None:
    rng = random.Random(1)
    for template in TABLES.templates:
        tables = replace(TABLES, templates=[template], template_weights=[1])
        for prompt in draw_prompts(tables, 20, rng):
            assert "{" not in prompt
            assert is_everyday(prompt), prompt
            assert not WRONG_ARTICLE_OR_MARK.search(prompt), prompt


def test_two_words_of_one_kind_are_never_the_same() -> None:
    tables = PromptTables(
        topics={"animal": ["fox", "owl"]},
        templates=["{a animal} or {a other}?"],
        openings=[],
        template_weights=[1],
        opening_weights=[],
        small_talk=[],
    )
    assert set(draw_prompts(tables, 50, random.Random(0))) == {"a fox or an owl?", "an owl or a fox?"}


def test_weights_decide_how_often_a_template_is_drawn() -> None:
    tables = replace(TABLES, templates=["Often?", "Seldom?"], template_weights=[9, 1])
    drawn = draw_prompts(tables, 2000, random.Random(0))
    assert 150 < drawn.count("Seldom?") < 250


def test_openings_are_left_for_the_teacher_to_complete() -> None:
    openings = draw_openings(TABLES, 200, random.Random(0))
    assert set(openings) <= set(TABLES.openings)
    assert not [text for text in openings if text.endswith((".", "?", "!"))]


@pytest.mark.parametrize("prompt", ["What is a fox?", "Tell me a short story.", "How are you doing today?"])
def test_what_people_type_is_everyday(prompt: str) -> None:
    assert is_everyday(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi there",
        "Why?",
        "Write code:\nprint(1)?",
        "What is 1234 plus two?",
        "See http://example.org for more.",
        "Was ist schön daran?",
        "What is this: [x]?",
        "word " * 25 + "?",
    ],
)
def test_what_is_not_plain_or_too_short_or_long_is_not(prompt: str) -> None:
    assert not is_everyday(prompt)


def test_an_answer_that_repeats_itself_or_names_the_teacher_is_not_good() -> None:
    sentence = "The fox lives in the forest. "
    assert is_good_answer(sentence + "It hunts at night.")
    assert not is_good_answer(sentence * 2)
    assert not is_good_answer("I am SmolLM and I like foxes.")
    assert not is_good_answer("Use x = {1, 2} for this one.")
    assert not is_good_answer("A fox.")


def test_small_talk_is_pairs_of_plain_text() -> None:
    assert len(TABLES.small_talk) > 20
    assert all(prompt and answer.isascii() and "\t" not in answer for prompt, answer in TABLES.small_talk)
