"""Everyday prompts for the teacher: templates filled with topics, and openings that the teacher completes.

Completing an opening of the user's turn is how Xu et al. ("Magpie", 2024) get prompts out of a chat model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_FIELD = re.compile(r"\{(a )?([a-z]+)\}")
_IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
    "sheep": "sheep",
    "deer": "deer",
    "salmon": "salmon",
    "goldfish": "goldfish",
    "butterfly": "butterflies",
    "dragonfly": "dragonflies",
    "canary": "canaries",
    "strawberry": "strawberries",
    "blueberry": "blueberries",
    "cherry": "cherries",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
}
_ARTICLES = ("a ", "an ", "the ")


@dataclass(frozen=True, slots=True)
class PromptTables:
    topics: dict[str, list[str]]  # words by kind
    templates: list[str]
    openings: list[str]
    template_weights: list[int]
    opening_weights: list[int]
    small_talk: list[tuple[str, str]]  # prompt, answer


def load_tables(directory: Path = _HERE) -> PromptTables:
    topics = {}
    for line in _lines(directory / "topics.txt"):
        kind, words = line.split(": ", 1)
        topics[kind] = words.split(", ")
    weighted = [line.split(": ", 1) for line in _lines(directory / "templates.txt")]
    templates = [(int(weight), text) for weight, text in weighted if not text.endswith("...")]
    openings = [(int(weight), text.removesuffix(" ...")) for weight, text in weighted if text.endswith("...")]
    talk = [line.split("\t", 1) for line in _lines(directory / "small_talk.txt")]
    return PromptTables(
        topics=topics,
        templates=[text for _, text in templates],
        openings=[text for _, text in openings],
        template_weights=[weight for weight, _ in templates],
        opening_weights=[weight for weight, _ in openings],
        small_talk=[(prompt, answer) for prompt, answer in talk],
    )


def draw_prompts(tables: PromptTables, count: int, rng: random.Random) -> list[str]:
    chosen = rng.choices(tables.templates, tables.template_weights, k=count)
    return [_filled(template, tables.topics, rng) for template in chosen]


def draw_openings(tables: PromptTables, count: int, rng: random.Random) -> list[str]:
    return rng.choices(tables.openings, tables.opening_weights, k=count)


def is_everyday(prompt: str) -> bool:
    """One line of plain text, of a length that people type."""
    is_plain = prompt.isascii() and not re.search(r"[\n\t#{}<>\[\]*_=|\\`~^]|http|\d{3}", prompt)
    return is_plain and 3 <= len(prompt.split()) <= 24 and prompt[-1] in "?.!"


def is_good_answer(answer: str) -> bool:
    """Plain words only, and no sentence twice: what a small model writes when it has lost its thread."""
    if not answer.isascii() or re.search(r"[{}<>\\|#`~^=\[\]]|http|SmolLM|Hugging", answer):
        return False
    sentences = [part.strip() for part in re.split(r"[.!?\n]", answer) if len(part.strip()) > 12]
    return len(answer.split()) >= 3 and len(set(sentences)) == len(sentences)


def _filled(template: str, topics: dict[str, list[str]], rng: random.Random) -> str:
    last_kind, used = "", ""

    def word_of(match: re.Match[str]) -> str:
        nonlocal last_kind, used
        article, name = match.groups()
        is_plural = name not in topics and name.endswith("s")
        kind = last_kind if name == "other" else name.removesuffix("s") if is_plural else name
        used = rng.choice([word for word in topics[kind] if word != used])
        last_kind = kind
        if is_plural:
            return plural(used)
        return with_article(used) if article else used.removesuffix("!")

    return _FIELD.sub(word_of, template)


def with_article(word: str) -> str:
    if word.endswith("!") or word.startswith(_ARTICLES):
        return word.removesuffix("!")
    is_vowel = word[0] in "aeiou" and not word.startswith("uni")
    return f"{'an' if is_vowel or word == 'honest' else 'a'} {word}"


def plural(word: str) -> str:
    if word.endswith("!"):
        return word.removesuffix("!")
    return _IRREGULAR.get(word) or word + ("es" if word.endswith(("ch", "sh", "s", "x")) else "s")


def _lines(path: Path) -> Sequence[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
