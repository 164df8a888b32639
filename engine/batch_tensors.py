"""Packs a scheduled batch into the tensors of a forward pass."""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.device_plan import plan_on_device
from engine.forward_batch import ForwardBatch
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence


class BatchTensors:
    """Keeps its buffers from step to step: a ForwardBatch is good until the next build()."""

    def __init__(
        self, token_budget: int, block_size: int, device: str, *, uses_kernels: bool = False
    ) -> None:
        """uses_kernels: batches come with a DevicePlan instead of padded block tables."""
        self._uses_kernels = uses_kernels
        self._block_size = block_size
        self._device = device
        self._rows = np.zeros((3, token_budget), dtype=np.int64)  # token ids, positions, slots
        self._rows_cpu = torch.from_numpy(self._rows)
        self._tables: list[list[int]] = []  # of the decodes of the last step
        self._table_lengths: list[int] = []
        self._tables_SB: torch.Tensor | None = None

    def build(self, batch: ScheduledBatch, logits_rows: list[int]) -> ForwardBatch:
        query_start = self._fill_rows(batch)
        num_tokens = query_start[-1]
        token_ids_T, positions_T, slots_T = self._rows_cpu[:, :num_tokens].to(self._device).unbind(0)
        decodes = batch.seqs[: batch.num_decodes]
        forward_batch = ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_mapping_T=slots_T,
            num_decodes=batch.num_decodes,
            query_start=query_start,
            context_len=[
                seq.num_computed_tokens + num_scheduled
                for seq, num_scheduled in zip(batch.seqs, batch.num_scheduled_tokens, strict=True)
            ],
            block_tables=[seq.block_table for seq in batch.seqs],
            logits_rows_N=torch.tensor(logits_rows, dtype=torch.int64, device=self._device),
            block_tables_SB=self._padded_tables(decodes) if decodes and not self._uses_kernels else None,
        )
        if self._uses_kernels:
            forward_batch.device_plan = plan_on_device(forward_batch, self._block_size)
        return forward_batch

    def _fill_rows(self, batch: ScheduledBatch) -> list[int]:
        """query_start."""
        size, num_decodes = self._block_size, batch.num_decodes
        decodes = batch.seqs[:num_decodes]
        positions = [seq.num_computed_tokens for seq in decodes]
        self._rows[0, :num_decodes] = [seq.token_ids[seq.num_computed_tokens] for seq in decodes]
        self._rows[1, :num_decodes] = positions
        self._rows[2, :num_decodes] = [
            seq.block_table[position // size] * size + position % size
            for seq, position in zip(decodes, positions, strict=True)
        ]
        query_start = list(range(num_decodes + 1))
        for seq, num_tokens in zip(
            batch.seqs[num_decodes:], batch.num_scheduled_tokens[num_decodes:], strict=True
        ):
            begin = query_start[-1]
            self._fill_chunk(seq, begin, num_tokens)
            query_start.append(begin + num_tokens)
        return query_start

    def _fill_chunk(self, seq: Sequence, begin: int, num_tokens: int) -> None:
        size = self._block_size
        first, last = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        rows = self._rows[:, begin : begin + num_tokens]
        rows[0] = seq.token_ids[first:last]
        rows[1] = np.arange(first, last)
        first_block = first // size
        blocks = np.array(seq.block_table[first_block : -(-last // size)], dtype=np.int64)
        rows[2] = blocks[rows[1] // size - first_block] * size + rows[1] % size

    def _padded_tables(self, decodes: list[Sequence]) -> torch.Tensor:
        """A decode gets a new block once in block_size steps: mostly the last step's tensor still holds."""
        tables = [seq.block_table for seq in decodes]
        lengths = [len(table) for table in tables]
        is_same = lengths == self._table_lengths and all(
            a is b for a, b in zip(tables, self._tables, strict=True)
        )
        if not is_same or self._tables_SB is None:
            padded = np.zeros((len(tables), max(lengths)), dtype=np.int64)
            for row, table in zip(padded, tables, strict=True):
                row[: len(table)] = table
            self._tables, self._table_lengths = tables, lengths
            self._tables_SB = torch.from_numpy(padded).to(self._device)
        return self._tables_SB
