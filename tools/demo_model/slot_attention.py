# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Attention of one new token a slot over the slot's own cache, of which every slot has used a different part.

S slots, H heads, K heads of keys and values, L places of a slot, C dims of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_ROWS = 32


def slot_attention(
    q_SHC: torch.Tensor,
    k_SKC: torch.Tensor,
    v_SKC: torch.Tensor,
    cache_2SKLC: torch.Tensor,
    position_S: torch.Tensor,
) -> torch.Tensor:
    """[S, H, C]; the new keys and values go to their place in the cache first."""
    slots = torch.arange(len(q_SHC), device=q_SHC.device)
    cache_2SKLC[0, slots, :, position_S] = k_SKC
    cache_2SKLC[1, slots, :, position_S] = v_SKC
    if q_SHC.device.type != "cuda":
        return _reference(q_SHC, cache_2SKLC, position_S)
    return launch(q_SHC, cache_2SKLC, position_S)


def launch(q_SHC: torch.Tensor, cache_2SKLC: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    num_slots, heads, dims = q_SHC.shape
    _, _, kv_heads, places, _ = cache_2SKLC.shape
    out = torch.empty_like(q_SHC)
    _kernel[(num_slots, kv_heads)](
        q_SHC,
        cache_2SKLC[0],
        cache_2SKLC[1],
        position_S,
        out,
        dims**-0.5 * 1.4426950408889634,
        places,
        QUERIES=heads // kv_heads,
        DIMS=dims,
        ROWS=_ROWS,
        num_warps=2,
    )
    return out


def _reference(q_SHC: torch.Tensor, cache_2SKLC: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    longest = int(position_S.max()) + 1
    keys, values = cache_2SKLC[:, :, :, :longest]
    is_seen = torch.arange(longest, device=q_SHC.device) <= position_S[:, None]
    return F.scaled_dot_product_attention(
        q_SHC[:, :, None], keys, values, attn_mask=is_seen[:, None, None], enable_gqa=True
    )[:, :, 0]


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    out_ptr,
    scale,
    places,
    QUERIES: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    queries = tl.arange(0, 16)
    dims = tl.arange(0, DIMS)
    is_query = queries < QUERIES
    places_q = ((slot * num_kv_heads + head) * QUERIES + queries[:, None]) * DIMS + dims[None, :]
    q = tl.load(q_ptr + places_q, mask=is_query[:, None], other=0.0)
    base = (slot * num_kv_heads + head) * places * DIMS
    count = tl.load(position_ptr + slot) + 1
    largest = tl.full([16], -float("inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DIMS], tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_row = rows < count
        offsets = base + rows[:, None] * DIMS + dims[None, :]
        k = tl.load(k_ptr + offsets, mask=is_row[:, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=is_row[:, None], other=0.0)
        scores = tl.where(is_row[None, :], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        probs = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(v.dtype), v, acc=acc * shrink[:, None])
        largest = new_largest
    out = acc / total[:, None]
    tl.store(out_ptr + places_q, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None])
