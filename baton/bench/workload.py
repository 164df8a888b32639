"""Which prompts are sent and when: pure functions of a few numbers and a seed.

A workload is a list of sessions. A session is one or more turns; each turn's prompt is everything said in
the session so far (prompts and the answers that came), and new tokens behind it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

FIRST_ORDINARY_ID = 100  # below it tokenizers keep control tokens, which some servers treat specially


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    new_ids: tuple[int, ...]  # behind what the session holds so far
    output_len: int  # tokens; the server is asked to ignore the end-of-sequence token
    think_s: float = 0.0  # since the answer before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    turns: tuple[Turn, ...]
    class_name: str = ""  # of its requests, in reports

    @property
    def num_requests(self) -> int:
        return len(self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts of one length. Their beginnings are shared: each prompt starts with one of `num_groups`
    prefixes, chosen at random."""

    num_requests: int
    prompt_len: int  # tokens
    output_len: int  # tokens
    shared_prefix_len: int = 0  # leading tokens that all prompts of a group have in common
    num_groups: int = 1
    vocab_size: int = 4_000  # random ids stay below it
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_requests, self.prompt_len, self.output_len, self.num_groups) < 1:
            raise ValueError(
                "number of requests, prompt length, output length and number of groups must be at least 1"
            )
        if not 0 <= self.shared_prefix_len <= self.prompt_len:
            raise ValueError(
                f"shared prefix of {self.shared_prefix_len} tokens: must be 0 to {self.prompt_len}"
            )
        check_vocabulary(self.vocab_size)

    def prefixes(self) -> list[list[int]]:
        """One a group; the same whatever num_requests is."""
        draw = random.Random(f"prefixes-{self.seed}")
        return [random_ids(draw, self.shared_prefix_len, self.vocab_size) for _ in range(self.num_groups)]

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        prefixes = self.prefixes()
        rest_len = self.prompt_len - self.shared_prefix_len
        return [
            draw.choice(prefixes) + random_ids(draw, rest_len, self.vocab_size)
            for _ in range(self.num_requests)
        ]

    def sessions(self) -> list[Session]:
        return [single_turn(prompt_ids, self.output_len) for prompt_ids in self.prompts()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """Multi-turn chat: a system prompt of one of `num_groups`, then turns that grow the history."""

    num_sessions: int
    num_turns: int
    prompt_len: int  # new tokens of a turn
    output_len: int  # tokens of an answer
    system_len: int = 0  # tokens in front of the first turn
    num_groups: int = 1  # different system prompts
    mean_think_s: float = 0.0  # between an answer and the next turn, exponential, at most four times this
    vocab_size: int = 4_000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_sessions, self.num_turns, self.prompt_len, self.output_len, self.num_groups) < 1:
            raise ValueError(
                "numbers of sessions, turns and groups and both lengths must be at least 1 for conversations"
            )
        if self.system_len < 0 or self.mean_think_s < 0:
            raise ValueError("length of the system prompt and think time must not be negative")
        check_vocabulary(self.vocab_size)

    @property
    def max_context_len(self) -> int:
        """Tokens of a session that has ended."""
        return self.system_len + self.num_turns * (self.prompt_len + self.output_len)

    def sessions(self) -> list[Session]:
        draw = random.Random(self.seed)
        systems = [random_ids(draw, self.system_len, self.vocab_size) for _ in range(self.num_groups)]
        return [self._session(draw, systems) for _ in range(self.num_sessions)]

    def _session(self, draw: random.Random, systems: Sequence[list[int]]) -> Session:
        turns = []
        for index in range(self.num_turns):
            start = draw.choice(systems) if index == 0 else []
            new_ids = start + random_ids(draw, self.prompt_len, self.vocab_size)
            think_s = self._think_s(draw) if index else 0.0
            turns.append(Turn(new_ids=tuple(new_ids), output_len=self.output_len, think_s=think_s))
        return Session(turns=tuple(turns))

    def _think_s(self, draw: random.Random) -> float:
        if not self.mean_think_s:
            return 0.0
        return min(draw.expovariate(1 / self.mean_think_s), 4 * self.mean_think_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Requests of one kind in a mixture."""

    name: str
    weight: float  # its share of the requests is its weight over the sum of all weights
    prompt_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> RequestClass:
        """NAME=WEIGHT:PROMPT_LEN:OUTPUT_LEN. ValueError for anything else."""
        name, equals, numbers = text.partition("=")
        parts = numbers.split(":")
        try:
            weight, prompt_len, output_len = float(parts[0]), int(parts[1]), int(parts[2])
        except (IndexError, ValueError):
            weight = 0.0
        if not name or not equals or len(parts) != 3 or not 0 < weight < float("inf"):
            raise ValueError(f"class {text!r}: must be NAME=WEIGHT:PROMPT_LEN:OUTPUT_LEN")
        if min(prompt_len, output_len) < 1:
            raise ValueError(f"class {text!r}: both lengths must be at least 1")
        return cls(name=name, weight=weight, prompt_len=prompt_len, output_len=output_len)


def mixed_sessions(
    classes: Sequence[RequestClass], num_requests: int, vocab_size: int, seed: int
) -> list[Session]:
    """Single random prompts; each one's class is drawn by weight, so shares hold on average."""
    check_vocabulary(vocab_size)
    if len({c.name for c in classes}) != len(classes):
        raise ValueError("two classes have the same name")
    draw = random.Random(seed)
    drawn = draw.choices(classes, weights=[c.weight for c in classes], k=num_requests)
    return [
        replace(
            single_turn(random_ids(draw, c.prompt_len, vocab_size), c.output_len),
            class_name=c.name,
        )
        for c in drawn
    ]


def single_turn(prompt_ids: Sequence[int], output_len: int) -> Session:
    return Session(turns=(Turn(new_ids=tuple(prompt_ids), output_len=output_len),))


def random_ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return draw.choices(range(FIRST_ORDINARY_ID, vocab_size), k=count)


def check_vocabulary(vocab_size: int) -> None:
    if vocab_size <= FIRST_ORDINARY_ID:
        raise ValueError(f"vocabulary of {vocab_size}: must be over {FIRST_ORDINARY_ID}")


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent; the first at 0."""
    if not 0 < rate_per_s < float("inf"):
        raise ValueError(f"rate {rate_per_s}: must be over 0")
    draw = random.Random(f"arrivals-{seed}")
    times = [0.0]
    for _ in range(num_requests - 1):
        times.append(times[-1] + draw.expovariate(rate_per_s))
    return times
