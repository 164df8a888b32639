"""Penalties and bias, and after them masks, in place on the logits of the rows that ask for them.

N rows, V vocabulary, P rows with penalties, M places of tokens that occur in them.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch

from engine.grammar.step_masks import NO_MASKS, StepMasks
from engine.sequence import Sequence
from engine.token_masks import is_masked, mask_tokens

Places = np.ndarray[Any, np.dtype[np.int64]]


def edit_logits(
    logits_NV: torch.Tensor,
    seqs: list[Sequence],
    eos_token_ids: frozenset[int],
    grammar_masks: StepMasks = NO_MASKS,
) -> None:
    """In the order of SamplingParams: penalties, logit_bias, masks."""
    penalised = [row for row, seq in enumerate(seqs) if has_penalties(seq)]
    if penalised:
        _apply_penalties(logits_NV, penalised, [seqs[row] for row in penalised])
    _add_bias(logits_NV, seqs)
    mask_tokens(logits_NV, seqs, eos_token_ids, grammar_masks)


def needs_edits(seq: Sequence) -> bool:
    return bool(seq.sampling.logit_bias) or is_masked(seq) or has_penalties(seq)


def has_penalties(seq: Sequence) -> bool:
    sampling = seq.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _apply_penalties(logits_NV: torch.Tensor, rows: list[int], seqs: list[Sequence]) -> None:
    """Touches only the tokens that occur: a few hundred a row, of a vocabulary of a hundred thousand."""
    vocab_size, device = logits_NV.shape[1], logits_NV.device
    # M places (row * vocab_size + token), each once
    places_M, all_counts_M = _count([seq.token_ids for seq in seqs], rows, vocab_size)
    _, prompt_counts_M = _count(
        [seq.token_ids[: seq.num_prompt_tokens] for seq in seqs], rows, vocab_size, places_M
    )
    output_counts_M = torch.from_numpy((all_counts_M - prompt_counts_M).astype(np.float32)).to(device)
    params_P3 = np.array(
        [
            (s.sampling.repetition_penalty, s.sampling.presence_penalty, s.sampling.frequency_penalty)
            for s in seqs
        ],
        dtype=np.float32,
    )
    params_M3 = params_P3[np.searchsorted(rows, places_M // vocab_size)]
    repetition_M, presence_M, frequency_M = torch.from_numpy(params_M3).to(device).unbind(1)
    index_M = torch.from_numpy(places_M).to(device)
    flat = logits_NV.view(-1)
    values_M = flat[index_M]
    values_M = torch.where(values_M > 0, values_M / repetition_M, values_M * repetition_M)
    values_M -= frequency_M * output_counts_M + presence_M * (output_counts_M > 0)
    flat[index_M] = values_M


def _count(
    tokens_of: list[array[int]], rows: list[int], vocab_size: int, places_M: Places | None = None
) -> tuple[Places, Places]:
    """Places where tokens occur, ascending, and how often; or how often at given places."""
    row_of = np.repeat(np.array(rows, dtype=np.int64), [len(tokens) for tokens in tokens_of])
    tokens = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in tokens_of])
    found, counts = np.unique(row_of * vocab_size + tokens, return_counts=True)
    if places_M is None:
        return found, counts
    counts_M = np.zeros_like(places_M)
    counts_M[np.searchsorted(places_M, found)] = counts
    return places_M, counts_M


def _add_bias(logits_NV: torch.Tensor, seqs: list[Sequence]) -> None:
    entries = [
        (row, token_id, bias)
        for row, seq in enumerate(seqs)
        if seq.sampling.logit_bias
        for token_id, bias in seq.sampling.logit_bias.items()
    ]
    if entries:
        rows, token_ids, biases = zip(*entries, strict=True)
        device = logits_NV.device
        index = (torch.tensor(rows, device=device), torch.tensor(token_ids, device=device))
        logits_NV.index_put_(
            index, torch.tensor(biases, device=device, dtype=logits_NV.dtype), accumulate=True
        )
