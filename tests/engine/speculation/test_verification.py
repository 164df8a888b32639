"""Drafts never change what is drawn; the right ones only bring it sooner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch_rows import SequenceRows
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.speculation.verification import NewTokens, logits_rows, verify

VOCAB_SIZE = 6
PROMPT = [1, 2, 3]
# Of the token that follows each token: a language of two-token contexts would show no more.
TABLE_VV = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 2


def sampling(kind: int, seed: int) -> SamplingParams:
    kinds = ({"temperature": 0.0}, {"frequency_penalty": 1.0}, {"temperature": 0.5, "top_k": 3}, {})
    return SamplingParams(seed=seed, max_tokens=50, **kinds[kind])  # type: ignore[arg-type]


def one_by_one(params: SamplingParams, num_tokens: int) -> list[int]:
    seq = Sequence(0, PROMPT, params)
    for _ in range(num_tokens):
        logits = TABLE_VV[seq.token_ids[-1]].clone().unsqueeze(0)
        seq.token_ids.append(Sampler(frozenset()).sample(logits, [seq])[0][0])
    return seq.output_ids


def verified(all_params: list[SamplingParams], all_drafts: list[list[int]]) -> list[NewTokens]:
    """One step over sequences that differ in parameters and drafts."""
    rows: list[SequenceRows] = []
    begin = 0
    for i, (params, drafts) in enumerate(zip(all_params, all_drafts, strict=True)):
        seq = Sequence(i, PROMPT, params)
        rows.append(SequenceRows(seq, len(PROMPT) - 1, 1 + len(drafts), begin, drafts))
        begin += 1 + len(drafts)
    token_of_row = [token_id for part in rows for token_id in part.token_ids()]
    logits_NV = TABLE_VV[[token_of_row[row] for row in logits_rows(rows)]]
    new = verify(Sampler(frozenset()), logits_NV, rows)
    assert all(part.seq.token_ids.tolist() == PROMPT for part in rows)
    return new


drafts_of_any_length = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4)
requests = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 50), drafts_of_any_length), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(requests)
def test_any_drafts_give_the_tokens_of_one_by_one(batch: list[tuple[int, int, list[int]]]) -> None:
    all_params = [sampling(kind, seed) for kind, seed, _ in batch]
    for params, (_, _, drafts), new in zip(
        all_params, batch, verified(all_params, [drafts for *_, drafts in batch]), strict=True
    ):
        expected = one_by_one(params, len(drafts) + 1)
        num_right = next(
            (i for i, (draft, token) in enumerate(zip(drafts, expected, strict=False)) if draft != token),
            len(drafts),
        )
        assert new.token_ids == expected[: num_right + 1]
        assert (new.num_accepted, new.num_rejected) == (num_right, len(drafts) - num_right)


def test_the_right_drafts_are_all_accepted() -> None:
    params = [sampling(kind, kind) for kind in range(4)]
    expected = [one_by_one(p, 4) for p in params]
    found = verified(params, [tokens[:3] for tokens in expected])
    assert [new.token_ids for new in found] == expected


@pytest.mark.parametrize("draft", range(VOCAB_SIZE))
def test_a_draft_moves_no_probability(draft: int) -> None:
    """Of the first token, and of the second where there is one: chi-square at its 0.1 % quantile."""
    num_draws = 6000
    params = [SamplingParams(seed=seed, max_tokens=9) for seed in range(num_draws)]
    found = [new.token_ids for new in verified(params, [[draft]] * num_draws)]
    first = np.bincount([tokens[0] for tokens in found], minlength=VOCAB_SIZE)
    second = [tokens[1] for tokens in found if len(tokens) == 2]
    assert len(second) == first[draft]
    check_drawn_from(first, TABLE_VV[PROMPT[-1]].softmax(0))
    if len(second) > 500:
        check_drawn_from(np.bincount(second, minlength=VOCAB_SIZE), TABLE_VV[draft].softmax(0))


def check_drawn_from(counts: np.ndarray, probabilities: torch.Tensor) -> None:  # type: ignore[type-arg]
    expected = probabilities.double().numpy() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 20.52
