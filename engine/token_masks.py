"""Tokens that must not be drawn: by a grammar, a list of allowed ids, bad words, or an end too early.

A row with a grammar or a list has a mask of the whole vocabulary, made on the host in bits; in the other rows
a few entries are struck out. N rows, V vocabulary, R rows with a mask, W bytes of bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import torch

from engine.grammar.step_masks import Bits, StepMasks
from engine.sequence import Sequence

# Of the eight tokens of a byte. To look them up is several times as fast as to select entries one by one.
_ADDENDS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1,
    np.float32(0.0),
    np.float32(-np.inf),
)


def is_masked(seq: Sequence) -> bool:
    sampling = seq.sampling
    return (
        seq.matcher is not None
        or bool(sampling.allowed_token_ids)
        or bool(sampling.bad_words)
        or seq.num_output_tokens < sampling.min_tokens
    )


def mask_tokens(
    logits_NV: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], grammar_masks: StepMasks
) -> None:
    """In place."""
    vocab_size = logits_NV.shape[1]
    struck: list[tuple[int, int]] = []  # (row, token id)
    rows: list[int] = []
    masks: list[Bits] = []
    for row, seq in enumerate(seqs):
        grammar_W = grammar_masks.of(seq)
        if grammar_W is not None or seq.sampling.allowed_token_ids:
            rows.append(row)
            masks.append(_row_mask(seq, grammar_W, eos_token_ids, vocab_size))
        elif is_masked(seq):
            struck += ((row, token_id) for token_id in _unwanted_ids(seq, eos_token_ids))
    if struck:
        _strike(logits_NV, struck)
    if rows:
        _apply(logits_NV, rows, np.stack(masks))


def _row_mask(seq: Sequence, grammar_W: Bits | None, eos_token_ids: frozenset[int], vocab_size: int) -> Bits:
    """From the strongest on; one that would leave nothing is left out."""
    allowed = seq.sampling.allowed_token_ids
    wanted = [] if grammar_W is None else [grammar_W]
    wanted += [_bits_of(allowed, vocab_size)] if allowed else []
    wanted += [~_bits_of(ids, vocab_size) for ids in (_bad_ids(seq), _early_ends(seq, eos_token_ids)) if ids]
    mask_W, *weaker = wanted
    for bits_W in weaker:
        both_W = mask_W & bits_W
        if both_W.any():
            mask_W = both_W
    return mask_W


def _unwanted_ids(seq: Sequence, eos_token_ids: frozenset[int]) -> set[int]:
    return _bad_ids(seq) | _early_ends(seq, eos_token_ids)


def _early_ends(seq: Sequence, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """What would end the sequence too early."""
    sampling = seq.sampling
    is_early = seq.num_output_tokens < sampling.min_tokens
    ends: frozenset[int] = sampling.stop_token_ids if is_early else frozenset()
    # An ignored end-of-sequence token is an ordinary one, except under a grammar, where it is none.
    under_grammar = seq.matcher is not None and seq.matcher.is_open
    if (is_early and not sampling.ignore_eos) or (under_grammar and sampling.ignore_eos):
        ends |= eos_token_ids
    return ends


def _bad_ids(seq: Sequence) -> set[int]:
    """Tokens that would complete a bad word."""
    output: array[int] | None = None
    found = set()
    for *before, last in seq.sampling.bad_words:
        if before:
            if output is None:
                longest = max(map(len, seq.sampling.bad_words)) - 1
                output = seq.token_ids[max(seq.num_prompt_tokens, seq.num_tokens - longest) :]
            if output[-len(before) :].tolist() != before:
                continue
        found.add(last)
    return found


def _bits_of(token_ids: Iterable[int], vocab_size: int) -> Bits:
    """Of whole words of 32 bits."""
    is_set = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.bool_)
    is_set[list(token_ids)] = True
    return np.packbits(is_set, bitorder="little")


def _strike(logits_NV: torch.Tensor, entries: list[tuple[int, int]]) -> None:
    rows, token_ids = (torch.tensor(column, device=logits_NV.device) for column in zip(*entries, strict=True))
    logits_NV[rows, token_ids] = -torch.inf


def _apply(logits_NV: torch.Tensor, rows: list[int], bits_RW: Bits) -> None:
    if logits_NV.device.type == "cpu":
        logits = logits_NV.numpy()
        for row, bits_W in zip(rows, bits_RW, strict=True):
            logits[row] += _ADDENDS[bits_W].reshape(-1)[: logits.shape[1]]
    else:
        # One copy that nobody waits for: 16 KiB a row of a vocabulary of 128 k.
        words = torch.from_numpy(bits_RW.view(np.int32)).pin_memory()
        apply_words(logits_NV, rows, words.to(logits_NV.device, non_blocking=True))


def apply_words(logits_NV: torch.Tensor, rows: list[int], words: torch.Tensor) -> None:
    """words: int32 [R, V / 32, rounded up], on the device of the logits."""
    shifts = torch.arange(32, device=logits_NV.device, dtype=torch.int32)
    is_masked_RV = ((words.unsqueeze(2) >> shifts) & 1).view(len(rows), -1)[:, : logits_NV.shape[1]] == 0
    if len(rows) == logits_NV.shape[0]:
        logits_NV.masked_fill_(is_masked_RV, -torch.inf)
    else:
        index_R = torch.tensor(rows, device=logits_NV.device)
        logits_NV[index_R] = logits_NV[index_R].masked_fill(is_masked_RV, -torch.inf)
