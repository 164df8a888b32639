"""Which prompts are sent and when: a pure function of a few numbers and a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

_FIRST_ORDINARY_ID = 100  # below it tokenizers keep control tokens, which some servers treat specially


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    num_requests: int
    prompt_len: int  # tokens
    output_len: int  # tokens; the server is asked to ignore the end-of-sequence token
    shared_prefix_len: int = 0  # leading tokens that all prompts have in common
    vocab_size: int = 4_000  # random ids stay below it
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_requests, self.prompt_len, self.output_len) < 1:
            raise ValueError("number of requests, prompt length and output length must be at least 1")
        if not 0 <= self.shared_prefix_len <= self.prompt_len:
            raise ValueError(
                f"shared prefix of {self.shared_prefix_len} tokens: must be 0 to {self.prompt_len}"
            )
        if self.vocab_size <= _FIRST_ORDINARY_ID:
            raise ValueError(f"vocabulary of {self.vocab_size}: must be over {_FIRST_ORDINARY_ID}")

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        prefix = self._ids(draw, self.shared_prefix_len)
        rest_len = self.prompt_len - self.shared_prefix_len
        return [prefix + self._ids(draw, rest_len) for _ in range(self.num_requests)]

    def _ids(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(_FIRST_ORDINARY_ID, self.vocab_size) for _ in range(count)]


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent; the first at 0."""
    if rate_per_s <= 0:
        raise ValueError(f"rate {rate_per_s}: must be over 0")
    draw = random.Random(f"arrivals-{seed}")
    times = [0.0]
    for _ in range(num_requests - 1):
        times.append(times[-1] + draw.expovariate(rate_per_s))
    return times
