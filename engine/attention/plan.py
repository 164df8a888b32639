"""Where the sequences of one batch find their rows in the cache: made once a step, used by every layer.

L rows of context; row size is the number of elements of one token in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.forward_batch import ForwardBatch

_MAX_PADDED_ELEMENTS = 48 * 1024


@dataclass(frozen=True, slots=True)
class Context:
    """Rows of one sequence."""

    num_tokens: int
    first_block: int
    block_ids_B: torch.Tensor | None  # None: the blocks lie one after another from first_block
    first_token: int = 0  # of the context; those before it are not seen

    def rows(self, cache: torch.Tensor) -> torch.Tensor:
        """[num_tokens - first_token, *token_shape] of a layer's cache [num_blocks, block_size, *token_shape];
        a view if the blocks are contiguous."""
        if self.block_ids_B is not None:
            return cache.index_select(0, self.block_ids_B).flatten(0, 1)[self.first_token : self.num_tokens]
        start = self.first_block * cache.shape[1]
        return cache.flatten(0, 1)[start + self.first_token : start + self.num_tokens]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt rows start .. end of the batch: the last rows of their context."""

    start: int
    end: int
    context: Context


@dataclass(frozen=True, slots=True)
class PaddedDecodes:
    """All decoding sequences padded to the longest: for rows so small that calls cost more than bytes."""

    block_ids: torch.Tensor  # int64 [S * B]
    num_seqs: int
    bias_S1L: torch.Tensor | None  # 0 inside a context, -inf beyond; None: all are equally long
    max_tokens: int
    first_token: int = 0

    def rows(self, cache: torch.Tensor) -> torch.Tensor:
        """[S, L, *token_shape]."""
        rows = cache.index_select(0, self.block_ids).flatten(0, 1)
        return rows.unflatten(0, (self.num_seqs, -1))[:, self.first_token : self.max_tokens]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    slots: torch.Tensor  # int64, of the stored rows
    stored_rows: torch.Tensor | None  # int64; None: all
    num_decodes: int
    padded_decodes: PaddedDecodes | None
    decodes: list[Context]  # empty if padded_decodes is given
    chunks: list[Chunk]


def plan_attention(batch: ForwardBatch, cache: torch.Tensor) -> AttentionPlan:
    """cache: any layer's, for its block size, row size, dtype and device."""
    num_decodes = batch.num_decodes
    padded, decodes = None, []
    if num_decodes > 1 and _is_padding_cheaper(batch, cache):
        padded = _padded_decodes(batch, cache)
    else:
        decodes = [_context(batch, s, cache) for s in range(num_decodes)]
    chunks = [
        Chunk(batch.query_start[s], batch.query_start[s + 1], _context(batch, s, cache))
        for s in range(num_decodes, batch.num_seqs)
    ]
    return AttentionPlan(*stored_rows(batch), num_decodes, padded, decodes, chunks)


def stored_rows(batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots of the rows that are stored, and which rows these are; None: all."""
    slots_T = batch.slot_mapping_T
    if not batch.has_unstored_rows:
        return slots_T, None
    rows = (slots_T >= 0).nonzero().squeeze(1)
    return slots_T[rows], rows


def _is_padding_cheaper(batch: ForwardBatch, cache: torch.Tensor) -> bool:
    row_size = cache[0, 0].numel()
    return (
        cache.device.type != "cpu"
        or max(batch.context_len[: batch.num_decodes]) * row_size <= _MAX_PADDED_ELEMENTS
    )


def _num_blocks(num_tokens: int, cache: torch.Tensor) -> int:
    return -(-num_tokens // cache.shape[1])


def _context(batch: ForwardBatch, s: int, cache: torch.Tensor) -> Context:
    num_tokens = batch.context_len[s]
    table = batch.block_tables[s][: _num_blocks(num_tokens, cache)]
    if table == list(range(table[0], table[0] + len(table))):
        return Context(num_tokens, table[0], None, batch.first_token)
    if s < batch.num_decodes and batch.block_tables_SB is not None:
        return Context(num_tokens, table[0], batch.block_tables_SB[s, : len(table)], batch.first_token)
    return Context(num_tokens, table[0], torch.tensor(table, device=cache.device), batch.first_token)


def _padded_decodes(batch: ForwardBatch, cache: torch.Tensor) -> PaddedDecodes:
    lengths = batch.context_len[: batch.num_decodes]
    longest = max(lengths)
    width = _num_blocks(longest, cache)
    if batch.block_tables_SB is not None and batch.block_tables_SB.shape[1] >= width:
        tables_SB = batch.block_tables_SB[: batch.num_decodes, :width]
    else:
        tables = [(table + [0] * width)[:width] for table in batch.block_tables[: batch.num_decodes]]
        tables_SB = torch.tensor(tables, device=cache.device)
    bias_S1L = None
    if min(lengths) < longest:
        is_beyond_SL = torch.arange(batch.first_token, longest) >= torch.tensor(lengths).unsqueeze(1)
        bias_SL = torch.zeros(is_beyond_SL.shape, dtype=cache.dtype).masked_fill_(is_beyond_SL, float("-inf"))
        bias_S1L = bias_SL.unsqueeze(1).to(cache.device)
    return PaddedDecodes(tables_SB.reshape(-1), len(lengths), bias_S1L, longest, batch.first_token)


def pick_rows(x_TD: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
    """[N, D]. None: all."""
    return x_TD if rows_N is None else x_TD.index_select(0, rows_N)


def write_rows(
    cache: torch.Tensor,
    slots: torch.Tensor,
    rows_T: torch.Tensor,
    stored_rows: torch.Tensor | None = None,
) -> None:
    """Store the rows [T, row size], or the stored_rows of them, in their slots."""
    if stored_rows is not None:
        rows_T = rows_T.index_select(0, stored_rows)
    cache.view(-1, rows_T.shape[-1]).index_copy_(0, slots, rows_T)
