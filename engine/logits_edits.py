"""Penalties, bias and masks, in place on the logits of the rows that ask for them.

N rows, V vocabulary, P rows with penalties.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch

from engine.sequence import Sequence


def edit_logits(logits_NV: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int]) -> None:
    """In the order of SamplingParams: penalties, logit_bias, min_tokens mask."""
    penalised = [row for row, seq in enumerate(seqs) if has_penalties(seq)]
    if penalised:
        _apply_penalties(logits_NV, penalised, [seqs[row] for row in penalised])
    _add_bias(logits_NV, seqs)
    _mask_ends(logits_NV, seqs, eos_token_ids)


def needs_edits(seq: Sequence) -> bool:
    sampling = seq.sampling
    return bool(sampling.logit_bias) or seq.num_output_tokens < sampling.min_tokens or has_penalties(seq)


def has_penalties(seq: Sequence) -> bool:
    sampling = seq.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _apply_penalties(logits_NV: torch.Tensor, rows: list[int], seqs: list[Sequence]) -> None:
    vocab_size, device = logits_NV.shape[1], logits_NV.device
    output_counts_PV = _counts([seq.token_ids[seq.num_prompt_tokens :] for seq in seqs], vocab_size).to(
        device
    )
    rows_P = torch.tensor(rows, device=device)
    params_P3 = torch.tensor(
        [
            (s.sampling.repetition_penalty, s.sampling.presence_penalty, s.sampling.frequency_penalty)
            for s in seqs
        ],
        device=device,
    )
    repetition, presence, frequency = (column.unsqueeze(1) for column in params_P3.unbind(1))
    logits_PV = logits_NV[rows_P]
    if any(seq.sampling.repetition_penalty != 1.0 for seq in seqs):
        is_present_PV = _counts([seq.token_ids for seq in seqs], vocab_size).to(device) > 0
        penalised_PV = torch.where(logits_PV > 0, logits_PV / repetition, logits_PV * repetition)
        logits_PV = torch.where(is_present_PV, penalised_PV, logits_PV)
    logits_PV -= frequency * output_counts_PV
    logits_PV -= presence * (output_counts_PV > 0)
    logits_NV[rows_P] = logits_PV


def _counts(tokens_of: list[array[int]], vocab_size: int) -> torch.Tensor:
    """float32 [P, V]: how often each row's tokens occur."""
    rows = np.repeat(np.arange(len(tokens_of)), [len(tokens) for tokens in tokens_of])
    tokens = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in tokens_of])
    counts = np.bincount(rows * vocab_size + tokens, minlength=len(tokens_of) * vocab_size)
    return torch.from_numpy(counts.astype(np.float32).reshape(-1, vocab_size))


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


def _mask_ends(logits_NV: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int]) -> None:
    """What would end a sequence too early cannot be drawn."""
    entries = [
        (row, token_id)
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.sampling.min_tokens
        for token_id in seq.sampling.stop_token_ids
        | (frozenset() if seq.sampling.ignore_eos else eos_token_ids)
    ]
    if entries:
        rows, token_ids = (
            torch.tensor(column, device=logits_NV.device) for column in zip(*entries, strict=True)
        )
        logits_NV[rows, token_ids] = -torch.inf
