"""How to draw tokens for one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.grammar.grammar import Grammar

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Drawing order: penalties, logit_bias, masks (grammar, allowed_token_ids, bad_words, min_tokens),
    temperature, top_k, top_p, min_p, draw. A mask that would leave no token is left out in that step; the
    grammar never is."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off; relative to the likeliest token
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int = 0  # with the position, the key of the counter-based generator
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    min_tokens: int = 0
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None: none; 0: of the chosen token; k: also of the k likeliest
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None  # the sequence must come with its matcher
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that never occur in this order in the output

    def __post_init__(self) -> None:
        for name, is_valid, accepted in self._rules():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} must be {accepted}, got {value!r}")

    @staticmethod
    def _rules():  # type: ignore[no-untyped-def]
        def finite(low: float, high: float = math.inf, *, open_low: bool = False):  # type: ignore[no-untyped-def]
            return lambda x: math.isfinite(x) and (low < x if open_low else low <= x) and x <= high

        def logprobs(x: int | None) -> bool:
            return x is None or 0 <= x <= MAX_LOGPROBS

        return (
            ("temperature", finite(0.0), "finite and at least 0"),
            ("top_p", finite(0.0, 1.0, open_low=True), "in (0, 1]"),
            ("top_k", finite(0), "0 (off) or more"),
            ("min_p", finite(0.0, 1.0), "in [0, 1]"),
            ("repetition_penalty", finite(0.0, open_low=True), "finite and above 0"),
            ("presence_penalty", finite(-2.0, 2.0), "in [-2, 2]"),
            ("frequency_penalty", finite(-2.0, 2.0), "in [-2, 2]"),
            ("seed", lambda x: 0 <= x < 2**64, "in [0, 2**64)"),
            ("min_tokens", finite(0), "0 or more"),
            ("max_tokens", finite(1), "1 or more"),
            ("bad_words", all, "lists of one or more token ids"),
            ("num_logprobs", logprobs, f"none or in [0, {MAX_LOGPROBS}]"),
            ("num_prompt_logprobs", logprobs, f"none or in [0, {MAX_LOGPROBS}]"),
        )
