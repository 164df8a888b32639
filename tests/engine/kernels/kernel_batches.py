"""Random batches over scattered blocks, for kernels and reference alike."""

from __future__ import annotations

import random

import torch

from engine.forward_batch import ForwardBatch


def scattered_batch(
    decodes: list[int], chunks: list[tuple[int, int]], block_size: int
) -> tuple[ForwardBatch, int]:
    """Contexts of the decodes, (cached, new) rows of the chunks; and the number of blocks of the cache."""
    scheduled = [(length, 1) for length in decodes] + [(cached + new, new) for cached, new in chunks]
    num_blocks = sum(-(-length // block_size) for length, _ in scheduled) + 2
    free = list(range(num_blocks))
    random.Random(1).shuffle(free)
    tables, starts, positions, slots = [], [0], [], []
    for length, new in scheduled:
        needed = -(-length // block_size)
        table, free = free[:needed], free[needed:]
        tables.append(table)
        starts.append(starts[-1] + new)
        rows = range(length - new, length)
        positions += rows
        slots += [table[i // block_size] * block_size + i % block_size for i in rows]
    batch = ForwardBatch(
        token_ids_T=torch.zeros(starts[-1], dtype=torch.int64),
        positions_T=torch.tensor(positions),
        slot_mapping_T=torch.tensor(slots),
        num_decodes=len(decodes),
        query_start=starts,
        context_len=[length for length, _ in scheduled],
        block_tables=tables,
        logits_rows_N=torch.empty(0, dtype=torch.int64),
    )
    return batch, num_blocks


def padded_tables(batch: ForwardBatch) -> torch.Tensor:
    width = max(len(table) for table in batch.block_tables)
    return torch.tensor(
        [table + [0] * (width - len(table)) for table in batch.block_tables], dtype=torch.int32
    )
