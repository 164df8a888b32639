# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Repetition, presence and frequency penalties from counts that stay on the device.

N rows, S slots (a sequence keeps its slot), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 2048


class TokenCounts:
    """How often each token occurs in the prompt (yes or no) and in the output, by slot."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.is_in_prompt_SV = torch.zeros(num_slots, vocab_size, dtype=torch.int8, device=device)
        self.output_counts_SV = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)

    def start(self, slot: int, prompt_ids: torch.Tensor, output_ids: torch.Tensor) -> None:
        """A sequence moves in; ids are int64 on the device."""
        self.is_in_prompt_SV[slot].zero_().index_fill_(0, prompt_ids, 1)
        ones = torch.ones_like(output_ids, dtype=torch.int32)
        self.output_counts_SV[slot].zero_().index_add_(0, output_ids, ones)

    def add(self, slots_N: torch.Tensor, token_ids_N: torch.Tensor) -> None:
        """One token of each row; both int64. A slot is given once."""
        ones = torch.ones_like(token_ids_N, dtype=torch.int32)
        self.output_counts_SV.index_put_((slots_N, token_ids_N), ones, accumulate=True)


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """float32 [N]; neutral values are 1, 0 and 0."""

    repetition_N: torch.Tensor
    presence_N: torch.Tensor
    frequency_N: torch.Tensor


def penalise_(
    logits_NV: torch.Tensor, slots_N: torch.Tensor, counts: TokenCounts, penalties: RowPenalties
) -> None:
    """In place, as engine.logits_edits does. Slots are int64; a slot below 0 leaves its row as it is."""
    num_rows, vocab_size = logits_NV.shape
    _penalty_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
        logits_NV,
        slots_N,
        counts.is_in_prompt_SV,
        counts.output_counts_SV,
        penalties.repetition_N,
        penalties.presence_N,
        penalties.frequency_N,
        logits_NV.stride(0),
        vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _penalty_kernel(
    logits_ptr,
    slots_ptr,
    prompt_ptr,
    output_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    is_neutral = (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0)
    if (slot >= 0) & (is_neutral == 0):
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_id = ids < vocab_size
        count = tl.load(output_ptr + slot * vocab_size + ids, mask=is_id, other=0)
        in_prompt = tl.load(prompt_ptr + slot * vocab_size + ids, mask=is_id, other=0)
        logits = tl.load(logits_ptr + row * stride + ids, mask=is_id, other=0.0).to(tl.float32)
        repeated = tl.where(logits > 0.0, logits / repetition, logits * repetition)
        logits = tl.where((count > 0) | (in_prompt != 0), repeated, logits)
        logits -= frequency * count.to(tl.float32) + presence * (count > 0).to(tl.float32)
        tl.store(logits_ptr + row * stride + ids, logits.to(logits_ptr.dtype.element_ty), mask=is_id)
