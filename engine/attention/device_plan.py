"""Where the sequences of one batch find their rows, as tensors that kernels read.

T tokens, S decoding sequences, B blocks of a table, L context rows of all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.uploads import upload

if TYPE_CHECKING:
    from engine.forward_batch import ForwardBatch


@dataclass(frozen=True)
class GatheredContext:
    """The cache held rows of the chunks' sequences before: all their rows up to the chunks' ends are gathered
    from it, as many as there are."""

    tables: list[list[int]]
    ends: list[int]  # tokens of each table
    first_token: int
    block_size: int
    device: torch.device

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [L]. Found when somebody asks: graphs read tables instead."""
        slots = context_slots(self.tables, self.ends, self.block_size, self.first_token)
        return upload(slots, self.device)


@dataclass(frozen=True, slots=True)
class PagedContext:
    """For graphs: what the cache held of the chunks' sequences before the chunks, in a fixed number of
    launches that reads on the device how much it is."""

    start: torch.Tensor  # int32 [chunks + 1], from 0: rows of all chunks one behind the other
    block_tables: torch.Tensor  # int32 [chunks, B]
    max_rows: int  # of all chunks


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Rows num_decodes .. T of the batch: all chunks of it."""

    query_start: torch.Tensor  # int32 [chunks + 1], from 0
    context_start: torch.Tensor  # int32 [chunks + 1], from 0; without the rows of a paged context
    context: GatheredContext | PagedContext | None  # None: nothing was cached before


@dataclass(frozen=True, slots=True)
class DevicePlan:
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64; below 0: padding
    num_decodes: int  # the first num_decodes rows
    block_tables_SB: torch.Tensor  # int32
    context_len_S: torch.Tensor  # int32; 0: padding
    chunks: ChunkRows | None
    first_token: int = 0  # of all contexts


def plan_on_device(batch: ForwardBatch, block_size: int) -> DevicePlan:
    """Copies what the batch holds as lists to the device of its tensors."""
    device = batch.token_ids_T.device
    num_decodes = batch.num_decodes
    if num_decodes:
        tables = [batch.block_tables[s] for s in range(num_decodes)]
        width = max(len(table) for table in tables)
        padded = np.zeros((num_decodes, width), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        block_tables_SB = upload(padded, device)
        context_len_S = upload(np.array(batch.context_len[:num_decodes], dtype=np.int32), device)
    else:
        block_tables_SB = torch.empty(0, 1, dtype=torch.int32, device=device)
        context_len_S = torch.empty(0, dtype=torch.int32, device=device)
    return DevicePlan(
        positions_T=batch.positions_T,
        slot_mapping_T=batch.slot_mapping_T,
        num_decodes=num_decodes,
        block_tables_SB=block_tables_SB,
        context_len_S=context_len_S,
        chunks=_plan_chunks(batch, block_size) if batch.num_seqs > num_decodes else None,
        first_token=batch.first_token,
    )


def _plan_chunks(batch: ForwardBatch, block_size: int) -> ChunkRows:
    device = batch.token_ids_T.device
    query_start = np.array(batch.query_start[batch.num_decodes :], dtype=np.int32) - batch.num_decodes
    ends = batch.context_len[batch.num_decodes :]
    lengths = np.array(ends, dtype=np.int32) - batch.first_token
    starts = np.zeros((2, len(query_start)), dtype=np.int32)
    starts[0] = query_start
    np.cumsum(lengths, out=starts[1, 1:])
    context = None
    if (lengths > np.diff(query_start)).any():
        tables = batch.block_tables[batch.num_decodes :]
        context = GatheredContext(tables, ends, batch.first_token, block_size, device)
    query_start_here, context_start = upload(starts, device).unbind()
    return ChunkRows(query_start_here, context_start, context)


def context_slots(
    tables: list[list[int]], ends: list[int], block_size: int, first_token: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Of the rows of all sequences one behind the other, each from first_token to its end."""
    pairs = zip(tables, ends, strict=True)
    return np.concatenate([_slots(table, end, block_size)[first_token:] for table, end in pairs])


def _slots(table: list[int], num_tokens: int, block_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    blocks = np.array(table[: -(-num_tokens // block_size)], dtype=np.int64)
    slots = blocks[:, None] * block_size + np.arange(block_size)
    return slots.reshape(-1)[:num_tokens]
