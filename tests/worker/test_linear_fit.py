from __future__ import annotations

from random import Random

import pytest

from worker.linear_fit import LinearFit


def test_a_step_is_told_apart_into_its_terms() -> None:
    fit, random = LinearFit(3, decay=0.99), Random(1)
    for _ in range(300):
        num_tokens, num_seqs = random.choice([0, 0, 0, 128, 512]), random.randrange(1, 17)
        noise = random.uniform(0.95, 1.05)
        fit.observe((1.0, num_tokens, num_seqs), noise * (0.02 + 0.0015 * num_tokens + 0.003 * num_seqs))
    assert fit.solve() == [
        pytest.approx(0.02, rel=0.1),
        pytest.approx(0.0015, rel=0.1),
        pytest.approx(0.003, rel=0.1),
    ]


def test_a_term_that_never_came_is_unknown() -> None:
    fit = LinearFit(3, decay=0.9)
    assert fit.solve() == [None, None, None]
    fit.observe((1.0, 100, 0), 0.1)
    step_s, token_s, seq_s = fit.solve()
    assert seq_s is None
    assert step_s is not None and token_s is not None
    assert step_s + 100 * token_s == pytest.approx(0.1, rel=0.01)


def test_terms_that_always_come_together_share() -> None:
    fit = LinearFit(2, decay=0.9)
    for _ in range(50):
        fit.observe((1.0, 8), 0.04)
    assert fit.solve() == [pytest.approx(0.02, rel=0.01), pytest.approx(0.0025, rel=0.01)]


def test_no_term_takes_back_time() -> None:
    """More tokens took less time: noise, or another machine's load."""
    fit = LinearFit(2, decay=0.99)
    for _ in range(20):
        fit.observe((1.0, 10), 0.5)
        fit.observe((1.0, 100), 0.1)
    assert all(value is not None and value >= 0 for value in fit.solve())


def test_a_machine_that_became_slower_is_followed() -> None:
    fit = LinearFit(2, decay=0.9)
    for scale in (1.0, 3.0):
        for num_tokens in (10, 500, 100, 30) * 20:
            fit.observe((1.0, num_tokens), scale * (0.01 + 0.001 * num_tokens))
    assert fit.solve() == [pytest.approx(0.03, rel=0.05), pytest.approx(0.003, rel=0.05)]


def test_what_is_not_seen_any_more_is_not_forgotten_at_once() -> None:
    fit = LinearFit(3, decay=0.99)
    for num_tokens in (100, 200, 300, 50):
        fit.observe((1.0, num_tokens, 1), 0.03 + 0.001 * num_tokens)
    for num_seqs in (1, 2, 3, 4) * 500:
        fit.observe((1.0, 0, num_seqs), 0.02 + 0.01 * num_seqs)
    _, token_s, seq_s = fit.solve()
    assert token_s == pytest.approx(0.001, rel=0.1)
    assert seq_s == pytest.approx(0.01, rel=0.05)
