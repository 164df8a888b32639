"""Masks off the CPU are applied by other means than on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.token_masks import apply_words


@pytest.mark.parametrize("vocab_size", [64, 70, 1003])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [0, 2]])
def test_words_of_bits_leave_the_same_tokens_as_lists_of_ids(vocab_size: int, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator)
    allowed = [torch.randperm(vocab_size, generator=generator)[:9].tolist() for _ in rows]
    is_set = np.zeros((len(rows), (vocab_size + 31) // 32 * 32), dtype=np.bool_)
    for row, token_ids in enumerate(allowed):
        is_set[row, token_ids] = True
    words = torch.from_numpy(np.packbits(is_set, axis=1, bitorder="little").view(np.int32))
    masked = logits.clone()

    apply_words(masked, rows, words)

    for row in range(3):
        ids = allowed[rows.index(row)] if row in rows else range(vocab_size)
        assert (masked[row] > -torch.inf).nonzero().squeeze(1).tolist() == sorted(ids)
        assert torch.equal(masked[row, list(ids)], logits[row, list(ids)])
    seqs = [
        Sequence(
            row,
            [1],
            SamplingParams(
                temperature=0.0, allowed_token_ids=tuple(allowed[rows.index(row)]) if row in rows else ()
            ),
        )
        for row in range(3)
    ]
    assert Sampler(frozenset()).sample(logits.clone(), seqs)[0] == masked.argmax(1).tolist()
