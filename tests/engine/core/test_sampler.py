from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.draw import draw
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

EOS = 2
NUM_DRAWS = 6000
# (degrees of freedom, 0.1 % quantile of chi-square)
QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 9: 27.88}


def seq_with(
    params: dict[str, Any], prompt_ids: list[int] | None = None, output_ids: list[int] | None = None
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 1000, **params})
    return Sequence(0, prompt_ids or [1], sampling, output_ids=output_ids or [])


def sample(logits: list[float], seq: Sequence) -> int:
    tokens, _ = Sampler(frozenset({EOS})).sample(torch.tensor([logits]), [seq])
    return tokens[0]


def frequencies(logits: torch.Tensor, num_draws: int = NUM_DRAWS, **params: Any) -> np.ndarray[Any, Any]:
    """How often each token was drawn, over so many seeds."""
    seqs = [seq_with({**params, "seed": seed}) for seed in range(num_draws)]
    tokens, _ = Sampler(frozenset()).sample(logits.repeat(num_draws, 1), seqs)
    return np.bincount(tokens, minlength=logits.shape[0])


def assert_drawn_from(counts: np.ndarray[Any, Any], probabilities: torch.Tensor) -> None:
    expected = probabilities.double().numpy() * NUM_DRAWS
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < QUANTILES[int(possible.sum()) - 1]


LOGITS = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.8])


def test_plain_draws_follow_the_softmax() -> None:
    assert_drawn_from(frequencies(LOGITS), LOGITS.softmax(0))


def test_temperature_sharpens_the_distribution() -> None:
    assert_drawn_from(frequencies(LOGITS, temperature=0.5), (LOGITS / 0.5).softmax(0))


def reference(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The textbook way: mask, renormalise, mask again; one row."""
    order = logits.argsort(descending=True)
    kept = logits.softmax(0)[order]
    if top_k:
        kept[top_k:] = 0.0
        kept = kept / kept.sum()
    before = kept.cumsum(0) - kept
    kept = torch.where(before < top_p, kept, 0.0)
    kept = torch.where(kept >= min_p * kept.max(), kept, 0.0)
    result = torch.zeros_like(logits)
    result[order] = kept / kept.sum()
    return result


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.3), (5, 0.7, 0.0), (6, 0.9, 0.2), (100, 1.0, 0.0)],
)
def test_truncated_draws_follow_the_truncated_distribution(top_k: int, top_p: float, min_p: float) -> None:
    counts = frequencies(LOGITS, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_drawn_from(counts, reference(LOGITS, top_k, top_p, min_p))


@pytest.mark.parametrize(
    "params", [{"top_p": 0.97}, {"min_p": 0.001}, {"top_k": 900}, {"top_k": 300, "top_p": 0.9}]
)
def test_a_flat_distribution_needs_more_than_the_candidates(params: dict[str, Any]) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 0.1
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
    possible = reference(logits, options["top_k"], options["top_p"], options["min_p"]) > 0
    drawn = frequencies(logits, 2500, **params) > 0
    assert possible.sum() > 256
    assert not (torch.from_numpy(drawn) & ~possible).any()
    assert drawn.sum() > 0.85 * int(possible.sum())


def test_tokens_that_tie_with_the_last_kept_one_are_kept() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, float(np.e)])
    assert_drawn_from(frequencies(logits, top_k=2), weights / weights.sum())


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3000, generator=generator) * 2
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_k": 700, "top_p": 0.99},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"top_p": 0.99999, "temperature": 3.0},
        {"logit_bias": {5: 4.0}, "frequency_penalty": 0.5},
    ]
    seqs = [seq_with({"seed": i, **kinds[i % len(kinds)]}, [i, i + 1], [i, i, 7]) for i in range(40)]
    sampler = Sampler(frozenset({EOS}))
    together, _ = sampler.sample(logits.clone(), seqs)
    alone = [sampler.sample(logits[i : i + 1].clone(), [seqs[i]])[0][0] for i in range(40)]
    assert together == alone


def test_the_position_changes_the_draw_and_the_same_position_repeats_it() -> None:
    logits = torch.zeros(1, 5000)
    sampler = Sampler(frozenset())
    draws = [sampler.sample(logits.clone(), [seq_with({"seed": 1}, [0] * n)])[0][0] for n in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-40])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    assert sample([1.0, 1.1, 1e4, 0.0], seq_with({"temperature": temperature})) == 2


def test_repetition_penalty_counts_prompt_and_output_and_pulls_both_signs_down() -> None:
    seq = seq_with({"temperature": 0, "repetition_penalty": 2.0}, [0], [1])
    assert sample([3.0, 3.0, -9.0, 1.6], seq) == 3
    assert sample([-1.0, -1.0, -9.0, -1.5], seq) == 3


def test_presence_penalty_counts_the_output_once_and_not_the_prompt() -> None:
    seq = seq_with({"temperature": 0, "presence_penalty": 1.0}, [0], [1, 1, 1])
    assert sample([0.0, 1.5, -9.0, 0.4], seq) == 1
    assert sample([0.0, 1.3, -9.0, 0.4], seq) == 3
    assert sample([1.2, 1.3, -9.0, 0.4], seq) == 0


def test_frequency_penalty_counts_every_occurrence_in_the_output() -> None:
    seq = seq_with({"temperature": 0, "frequency_penalty": 0.5}, [0], [1, 1, 1])
    assert sample([0.0, 1.6, -9.0, 0.0], seq) == 1
    assert sample([0.2, 1.6, -9.0, 0.0], seq) == 0


def test_logit_bias_lifts_and_bans_tokens() -> None:
    assert sample([0.0, 1.0, -9.0, 0.5], seq_with({"temperature": 0, "logit_bias": {3: 0.6}})) == 3
    assert sample([0.0, 1.0, -9.0, 0.5], seq_with({"temperature": 0, "logit_bias": {1: -100.0}})) == 3


def test_min_tokens_masks_end_and_stop_tokens_until_then() -> None:
    params = {"temperature": 0, "min_tokens": 2, "stop_token_ids": frozenset({3})}
    logits = [0.0, 1.0, 3.0, 2.0]
    assert sample(logits, seq_with(params, [1], [1])) == 1
    assert sample(logits, seq_with(params, [1], [1, 1])) == EOS
    assert sample(logits, seq_with({**params, "ignore_eos": True}, [1], [1])) == EOS


def test_only_allowed_tokens_are_drawn_in_their_proportions() -> None:
    allowed = (0, 3, 5)
    probabilities = torch.zeros(8)
    probabilities[list(allowed)] = LOGITS[list(allowed)].softmax(0)
    assert_drawn_from(frequencies(LOGITS, allowed_token_ids=allowed), probabilities)


def test_min_p_and_top_k_count_among_the_allowed_tokens() -> None:
    allowed = (0, 1, 2, 4, 6)
    logits = torch.full_like(LOGITS, -torch.inf)
    logits[list(allowed)] = LOGITS[list(allowed)]
    for params in ({"top_k": 3}, {"min_p": 0.4}, {"top_p": 0.7}, {"top_k": 4, "min_p": 0.2}):
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
        expected = reference(logits, int(options["top_k"]), options["top_p"], options["min_p"])
        assert_drawn_from(frequencies(LOGITS, allowed_token_ids=allowed, **params), expected)


def test_an_end_that_is_not_allowed_is_not_drawn_and_an_allowed_one_only_after_min_tokens() -> None:
    logits = [0.0, 1.0, 9.0, 0.5]
    assert sample(logits, seq_with({"temperature": 0, "allowed_token_ids": (0, 3)})) == 3
    params = {"temperature": 0, "allowed_token_ids": (0, EOS), "min_tokens": 1}
    assert sample(logits, seq_with(params)) == 0
    assert sample(logits, seq_with(params, [1], [1])) == EOS
    # Nothing else is left: what min_tokens forbids is drawn all the same.
    assert sample(logits, seq_with({**params, "allowed_token_ids": (EOS,)})) == EOS


def test_bad_words_lose_their_last_token_where_it_would_complete_them() -> None:
    params = {"temperature": 0, "bad_words": ((0,), (3, 1), (1, 3, 1))}
    logits = [9.0, 5.0, -9.0, 2.0, 1.0]
    assert sample(logits, seq_with(params, [3])) == 1  # the prompt is no part of a word
    assert sample(logits, seq_with(params, [1], [3])) == 3
    assert sample(logits, seq_with(params, [1], [3, 4])) == 1
    assert sample(logits, seq_with({**params, "bad_words": ((1, 3, 1),)}, [1], [1, 3])) == 0
    three = {**params, "bad_words": ((0,), (1, 3, 1))}
    assert sample(logits, seq_with(three, [1], [1, 3])) == 3
    assert sample(logits, seq_with(three, [1], [4, 3])) == 1


def test_bad_words_choose_among_the_allowed_tokens_while_one_is_left() -> None:
    params = {"temperature": 0, "allowed_token_ids": (1, 3), "bad_words": ((1,),)}
    assert sample([9.0, 5.0, -9.0, 2.0], seq_with(params)) == 3
    assert sample([9.0, 5.0, -9.0, 2.0], seq_with({**params, "bad_words": ((1,), (3,))})) == 1


def test_a_whole_vocabulary_is_masked_in_the_right_places() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 1003, generator=generator)
    allowed = [tuple(torch.randperm(1003, generator=generator)[: 1 + 200 * row].tolist()) for row in range(6)]
    seqs = [seq_with({"temperature": 0, "allowed_token_ids": ids}) for ids in allowed]
    tokens, _ = Sampler(frozenset({EOS})).sample(logits.clone(), seqs)
    expected = [max(ids, key=lambda i: float(logits[row, i])) for row, ids in enumerate(allowed)]
    assert tokens == expected


def test_an_empty_bad_word_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_words"):
        SamplingParams(bad_words=((1,), ()))


def test_edits_of_one_row_leave_the_others_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    seqs = [
        seq_with({"temperature": 0, "repetition_penalty": 5.0, "logit_bias": {1: -5.0}}, [1]),
        seq_with({"temperature": 0}, [1]),
    ]
    assert Sampler(frozenset()).sample(logits, seqs)[0] == [0, 1]


def test_logprobs_are_of_the_model_before_penalties_and_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    expected = logits.log_softmax(1)
    seqs = [
        seq_with({"temperature": 0, "num_logprobs": 2, "logit_bias": {3: 50.0}}),
        seq_with({"temperature": 0}),
    ]
    tokens, logprobs = Sampler(frozenset()).sample(logits.clone(), seqs)
    assert tokens == [3, 3]
    assert logprobs[1] is None
    entry = logprobs[0]
    assert entry is not None
    assert entry.token_id == 3
    assert entry.logprob == pytest.approx(float(expected[0, 3]))
    assert entry.top_token_ids == (1, 2)
    assert entry.top_logprobs == pytest.approx((float(expected[0, 1]), float(expected[0, 2])))


def test_zero_logprobs_mean_the_chosen_token_only() -> None:
    seq = seq_with({"temperature": 0, "num_logprobs": 0})
    _, logprobs = Sampler(frozenset()).sample(torch.tensor([[1.0, 3.0]]), [seq])
    assert logprobs[0] is not None
    assert (logprobs[0].token_id, logprobs[0].top_token_ids) == (1, ())


def extreme(build: Callable[[], torch.Tensor]) -> int:
    seq = seq_with({"temperature": 1.0, "top_p": 0.5, "seed": 4})
    return Sampler(frozenset()).sample(build(), [seq])[0][0]


def test_infinitely_unlikely_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 299] = -1e4
    assert extreme(lambda: logits) == 299


def test_a_whole_vocabulary_is_searched_like_a_short_one() -> None:
    few = torch.tensor([0.3, 0.2, 0.4, 0.1])
    places = [0, 127, 128, 5119]
    logits = torch.full((5120,), -torch.inf)
    logits[places] = few.log()
    counts = frequencies(logits, 3000)
    assert sorted(counts.nonzero()[0].tolist()) == places
    chi_square = ((counts[places] - 3000 * few.numpy()) ** 2 / (3000 * few.numpy())).sum()
    assert chi_square < QUANTILES[3]


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [7, 5120])
def test_the_ends_of_the_unit_interval_draw_tokens_with_weight(u: float, vocab_size: int) -> None:
    scaled = torch.full((1, vocab_size), -torch.inf)
    scaled[0, 3], scaled[0, 5] = 0.0, -1.0
    (token,) = draw(scaled, torch.tensor([u], dtype=torch.float64)).tolist()
    assert token == (5 if u > 0.9 else 3)


def test_ties_beyond_the_candidates_do_not_let_the_batch_into_a_draw() -> None:
    logits = torch.zeros(2, 1000)
    seqs = [seq_with({"seed": 5, "top_k": 300, "top_p": 0.5}), seq_with({"seed": 6, "top_k": 800})]
    sampler = Sampler(frozenset())
    alone = sampler.sample(logits[:1].clone(), seqs[:1])[0]
    assert sampler.sample(logits.clone(), seqs)[0][0] == alone[0]
