"""Grouped-query attention of a packed batch by FlashAttention, as torch ships it for CUDA devices.

Decode rows and chunks are one call: the rows that the cache holds of all sequences are gathered one behind
the other, and each sequence's queries are the last rows of its context.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from engine.attention.device_plan import context_slots
from engine.attention.plan import stored_rows
from engine.forward_batch import ForwardBatch
from engine.uploads import upload

_MAX_HEAD_DIM = 256
_CAUSAL = (-1, 0)  # a window of everything before, and nothing behind


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """S sequences with L rows of context altogether. Made once a step, used by every layer."""

    slots: torch.Tensor  # int64, of the stored rows
    stored_rows: torch.Tensor | None  # int64; None: all
    context_slots_L: torch.Tensor  # int64
    query_start: torch.Tensor  # int32 [S + 1]
    context_start: torch.Tensor  # int32 [S + 1]
    max_queries: int
    max_context: int


def can_pack(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the library has a kernel for it."""
    return (
        torch.device(device).type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % 8 == 0
    )


def plan_packed(batch: ForwardBatch, cache: torch.Tensor) -> PackedPlan:
    """cache: any layer's, for its block size and device."""
    device, block_size = cache.device, cache.shape[1]
    lengths = np.array(batch.context_len)
    starts = np.zeros((2, batch.num_seqs + 1), dtype=np.int32)
    starts[0] = batch.query_start
    np.cumsum(lengths, out=starts[1, 1:])
    query_start, context_start = upload(starts, device).unbind()
    slots, rows = stored_rows(batch)
    return PackedPlan(
        slots=slots,
        stored_rows=rows,
        context_slots_L=upload(context_slots(batch.block_tables, batch.context_len, block_size), device),
        query_start=query_start,
        context_start=context_start,
        max_queries=int(np.diff(starts[0]).max()),
        max_context=int(lengths.max()),
    )


def attend_packed(q_THQ: torch.Tensor, cache: torch.Tensor, plan: PackedPlan) -> torch.Tensor:
    """[T, H, Q] of rotated, scaled queries over rows already in the cache [blocks, block size, 2, K, Q]."""
    rows_L2KQ = cache.flatten(0, 1).index_select(0, plan.context_slots_L)
    return _library()(
        q_THQ,
        rows_L2KQ[:, 0],
        rows_L2KQ[:, 1],
        plan.query_start,
        plan.context_start,
        plan.max_queries,
        plan.max_context,
        scale=1.0,
        window_size=_CAUSAL,
    )


@cache
def _library() -> Callable[..., torch.Tensor]:
    from torch.nn.attention import varlen

    attend: Callable[..., Any] = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(attend).parameters:
        return partial(attend, enable_gqa=True)
    return attend  # older ones see from the shapes that key heads serve several queries each
