"""A scheduled batch as rows and tensors, and the prompt logprobs that some of its chunks want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.batch_rows import SequenceRows, main_rows
from engine.batch_tensors import BatchTensors
from engine.forward_batch import ForwardBatch
from engine.logprobs import token_logprobs
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from engine.speculation.verification import logits_rows

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

LOGITS_ROWS_AT_ONCE = 64  # of prompt logprobs: bounds the memory of [rows, vocabulary]


@dataclass(slots=True)
class PromptRows:
    """Rows of one chunk whose next token is a prompt token, for prompt logprobs."""

    seq: Sequence
    begin: int
    end: int
    next_token_ids: list[int]

    def add_logprobs(self, model: CausalLM, hidden_TD: torch.Tensor) -> None:
        """To the sequence. Waits for the device."""
        num_top = self.seq.sampling.num_prompt_logprobs or 0
        for begin in range(self.begin, self.end, LOGITS_ROWS_AT_ONCE):
            end = min(begin + LOGITS_ROWS_AT_ONCE, self.end)
            logits = model.logits(hidden_TD[begin:end])
            token_ids = self.next_token_ids[begin - self.begin : end - self.begin]
            self.seq.prompt_logprobs += token_logprobs(logits, token_ids, [num_top] * len(token_ids))


@dataclass(slots=True)
class PreparedBatch:
    """Holds until the next one is prepared."""

    rows: list[SequenceRows]
    sampled: list[SequenceRows]
    prompt_rows: list[PromptRows]
    batch: ForwardBatch
    wants_all_logits: bool
    wanted_N: torch.Tensor | None  # rows whose hidden state is needed; None: all

    def wanted(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Of the rows whose hidden state is needed, those whose logits are."""
        is_all = self.wants_all_logits or self.wanted_N is not None
        return hidden_ND if is_all else hidden_ND.index_select(0, self.batch.logits_rows_N)


def prepare(batch: ScheduledBatch, tensors: BatchTensors, *, speculates: bool) -> PreparedBatch:
    rows = main_rows(batch, speculates=speculates)
    sampled = [part for part in rows if part.end_position >= part.seq.num_tokens]
    wanted_rows = logits_rows(sampled)
    forward_batch = tensors.build(rows, batch.num_decodes, wanted_rows)
    wants_all = wanted_rows == list(range(forward_batch.num_tokens))
    prompt_rows = _prompt_rows(rows)
    is_logits_only = not (speculates or prompt_rows or wants_all)  # drafts come from all hidden states
    wanted_N = forward_batch.logits_rows_N if is_logits_only else None
    return PreparedBatch(rows, sampled, prompt_rows, forward_batch, wants_all, wanted_N)


def _prompt_rows(rows: list[SequenceRows]) -> list[PromptRows]:
    wanted = []
    for part in rows:
        seq = part.seq
        first, end = seq.num_computed_tokens, min(part.end_position, seq.num_prompt_tokens - 1)
        if seq.wants_prompt_logprobs and first < end:
            next_ids = seq.token_ids[first + 1 : end + 1].tolist()
            wanted.append(PromptRows(seq, part.row_of(first), part.row_of(end), next_ids))
    return wanted
