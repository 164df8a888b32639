"""Which row of a fixed batch each decoding sequence has, and what stands in it, on the host.

A sequence keeps its row while it decodes: then a step changes three numbers of it, and now and then one block
of its table. Rows are dense: where one leaves, a new sequence or the last row moves in.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from engine.sequence import Sequence
from engine.uploads import upload


class DecodeRows:
    def __init__(self, max_seqs: int, *, is_pinned: bool) -> None:
        # token ids, positions, places of pending tokens
        self.rows_3N = torch.zeros(3, max_seqs, dtype=torch.int64, pin_memory=is_pinned)
        self._rows = self.rows_3N.numpy()
        self._row_of: dict[Sequence, int] = {}
        self._known: list[list[int]] = []  # the block table of each row, and how much of it is written
        self._lengths: list[int] = []

    def update(
        self,
        seqs: list[Sequence],
        num_rows: int,
        places: Mapping[Sequence, int] = MappingProxyType({}),
    ) -> list[Sequence]:
        """The sequences in the order of their rows. Rows beyond them, up to num_rows, get position -1.
        places: of the pending tokens; the other rows get place -1."""
        self._drop_others(seqs)
        for seq in seqs:
            if seq not in self._row_of:
                self._row_of[seq] = len(self._known)
                self._known.append([])
                self._lengths.append(0)
        placed = list(self._row_of)
        placed.sort(key=self._row_of.__getitem__)
        positions = [seq.num_computed_tokens for seq in placed]
        num_seqs = len(placed)
        self._rows[0, :num_seqs] = [
            0 if seq.num_pending_tokens else seq.token_ids[position]
            for seq, position in zip(placed, positions, strict=True)
        ]
        self._rows[1, :num_seqs] = positions
        self._rows[1, num_seqs:num_rows] = -1
        self._rows[2, :num_seqs] = [places.get(seq, -1) for seq in placed]
        self._rows[2, num_seqs:num_rows] = -1
        return placed

    def _drop_others(self, seqs: list[Sequence]) -> None:
        wanted = set(seqs)
        gone = [seq for seq in self._row_of if seq not in wanted]
        if not gone:
            return
        seq_at = {row: seq for seq, row in self._row_of.items()}
        for row in sorted((self._row_of.pop(seq) for seq in gone), reverse=True):
            last = len(self._known) - 1
            if row != last:
                self._row_of[seq_at[last]] = row
                seq_at[row] = seq_at[last]
                self._known[row] = self._known[last]
                self._lengths[row] = 0  # written anew
            self._known.pop()
            self._lengths.pop()

    def write_tables(self, tables_NB: torch.Tensor) -> None:
        """Brings the rows' block tables on the device up to date: what has changed is uploaded, and nobody
        waits."""
        rows: list[int] = []
        columns: list[int] = []
        block_ids: list[int] = []
        for seq, row in self._row_of.items():
            table = seq.block_table
            if self._known[row] is not table:
                self._known[row], self._lengths[row] = table, 0
            first, end = self._lengths[row], len(table)
            if first != end:
                rows += [row] * (end - first)
                columns += range(first, end)
                block_ids += table[first:]
                self._lengths[row] = end
        if rows:
            changes_3M = upload(np.array([rows, columns, block_ids]), tables_NB.device)
            tables_NB[changes_3M[0], changes_3M[1]] = changes_3M[2].to(tables_NB.dtype)
