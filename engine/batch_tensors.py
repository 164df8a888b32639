"""Packs the rows of sequences into the tensors of a forward pass."""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.device_plan import plan_on_device
from engine.batch_rows import SequenceRows
from engine.forward_batch import ForwardBatch
from engine.uploads import upload


class BatchTensors:
    """Keeps its buffers from step to step: a ForwardBatch is good until the next build()."""

    def __init__(
        self,
        max_rows: int,
        block_size: int,
        device: str,
        *,
        uses_kernels: bool = False,
        first_token: int = 0,
    ) -> None:
        """uses_kernels: batches come with a DevicePlan instead of padded block tables. first_token: where all
        contexts begin."""
        self._uses_kernels = uses_kernels
        self._block_size = block_size
        self._device = torch.device(device)
        self._first_token = first_token
        self._rows = np.zeros((3, max_rows), dtype=np.int64)  # token ids, positions, slots
        self._tables: list[list[int]] = []  # of the decode rows of the last step
        self._table_lengths: list[int] = []
        self._tables_SB: torch.Tensor | None = None

    def build(self, rows: list[SequenceRows], num_decoding: int, wanted_rows: list[int]) -> ForwardBatch:
        """The first num_decoding sequences have decode rows, the others a chunk each. wanted_rows: those
        whose logits are wanted."""
        decoding = rows[:num_decoding]
        num_decodes = sum(part.num_rows for part in decoding)
        num_rows = self._fill(rows, num_decoding)
        context_len, tables = _decode_rows(decoding)
        query_start = list(range(num_decodes + 1))
        for part in rows[num_decoding:]:
            query_start.append(part.begin + part.num_rows)
            context_len.append(part.end_position)
            tables.append(part.seq.block_table)
        token_ids_T, positions_T, slots_T = upload(self._rows[:, :num_rows], self._device).unbind(0)
        forward_batch = ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_mapping_T=slots_T,
            num_decodes=num_decodes,
            query_start=query_start,
            context_len=context_len,
            block_tables=tables,
            logits_rows_N=upload(np.array(wanted_rows, dtype=np.int64), self._device),
            has_unstored_rows=any(map(self._has_unstored_rows, rows)),
            first_token=self._first_token,
        )
        if self._uses_kernels:
            forward_batch.device_plan = plan_on_device(forward_batch, self._block_size)
        elif num_decodes:
            forward_batch.block_tables_SB = self._padded_tables(tables[:num_decodes])
        return forward_batch

    def _fill(self, rows: list[SequenceRows], num_decoding: int) -> int:
        """Number of rows."""
        size = self._block_size
        num_single = next(
            (i for i, part in enumerate(rows[:num_decoding]) if part.num_rows != 1 or part.tail), num_decoding
        )
        single = rows[:num_single]
        positions = [part.first for part in single]
        self._rows[0, :num_single] = [part.seq.token_ids[part.first] for part in single]
        self._rows[1, :num_single] = positions
        self._rows[2, :num_single] = [
            part.seq.block_table[position // size] * size + position % size
            for part, position in zip(single, positions, strict=True)
        ]
        for part in rows[num_single:]:
            self._fill_part(part)
        return rows[-1].begin + rows[-1].num_rows if rows else 0

    def _fill_part(self, part: SequenceRows) -> None:
        size = self._block_size
        first, end = part.first, part.end_position
        rows = self._rows[:, part.begin : part.begin + part.num_rows]
        rows[0] = part.token_ids()
        rows[1] = np.arange(first, end)
        first_block = first // size
        blocks = np.array(part.seq.block_table[first_block : -(-end // size)], dtype=np.int64)
        rows[2] = blocks[rows[1] // size - first_block] * size + rows[1] % size
        if self._has_unstored_rows(part):
            rows[2, : part.seq.num_registered_blocks * size - first] = -1

    def _has_unstored_rows(self, part: SequenceRows) -> bool:
        """A registered block is others' too, and does not change: what is computed again is not stored."""
        return part.first < part.seq.num_registered_blocks * self._block_size

    def _padded_tables(self, tables: list[list[int]]) -> torch.Tensor:
        """A decode gets a new block once in block_size steps: mostly the last step's tensor still holds."""
        lengths = [len(table) for table in tables]
        is_same = lengths == self._table_lengths and all(
            a is b for a, b in zip(tables, self._tables, strict=True)
        )
        if not is_same or self._tables_SB is None:
            padded = np.zeros((len(tables), max(lengths)), dtype=np.int64)
            for row, table in zip(padded, tables, strict=True):
                row[: len(table)] = table
            self._tables, self._table_lengths = tables, lengths
            self._tables_SB = upload(padded, self._device)
        return self._tables_SB


def _decode_rows(decoding: list[SequenceRows]) -> tuple[list[int], list[list[int]]]:
    """Context length and block table of each row."""
    context_len: list[int] = []
    tables: list[list[int]] = []
    for part in decoding:
        context_len += range(part.first + 1, part.end_position + 1)
        tables += [part.seq.block_table] * part.num_rows
    return context_len, tables
