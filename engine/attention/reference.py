"""Attention row by row, obvious and slow: what the fast forms are tested against."""

from __future__ import annotations

import torch

from engine.forward_batch import ForwardBatch


def gqa_reference(q_THQ: torch.Tensor, batch: ForwardBatch, cache: torch.Tensor) -> torch.Tensor:
    """float64 [T, H, Q]. cache [num_blocks, block_size, 2, K, Q]; head h reads key head h * K // H; queries
    carry the scale."""
    keys, values = cache.double().unbind(dim=2)
    group = q_THQ.shape[1] // keys.shape[2]
    return _attend(q_THQ, batch, keys.repeat_interleave(group, dim=2), values.repeat_interleave(group, dim=2))


def mla_reference(
    q_THQ: torch.Tensor,
    batch: ForwardBatch,
    cache: torch.Tensor,
    key_HNC: torch.Tensor,
    value_HCV: torch.Tensor,
) -> torch.Tensor:
    """float64 [T, H, V]. cache [num_blocks, block_size, C + R], expanded for every head."""
    num_heads, _, rank = key_HNC.shape
    latent, shared_key = cache.double().split((rank, cache.shape[-1] - rank), dim=-1)
    keys = torch.einsum("blc,hnc->blhn", latent, key_HNC.double())
    keys = torch.cat((keys, shared_key.unsqueeze(2).expand(-1, -1, num_heads, -1)), dim=-1)
    return _attend(q_THQ, batch, keys, torch.einsum("blc,hcv->blhv", latent, value_HCV.double()))


def _attend(
    q_THQ: torch.Tensor, batch: ForwardBatch, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """keys and values [num_blocks, block_size, H, ...]."""
    block_size = keys.shape[1]
    out = torch.empty(*q_THQ.shape[:2], values.shape[-1], dtype=torch.float64)
    for s in range(batch.num_seqs):
        context = range(batch.context_len[s])
        blocks = [batch.block_tables[s][i // block_size] for i in context]
        offsets = [i % block_size for i in context]
        keys_LHQ, values_LHV = keys[blocks, offsets], values[blocks, offsets]
        first, end = batch.query_start[s], batch.query_start[s + 1]
        for row in range(first, end):
            num_visible = len(context) - (end - 1 - row)
            scores_HL = torch.einsum("hq,lhq->hl", q_THQ[row].double(), keys_LHQ[:num_visible])
            probs_HL = torch.softmax(scores_HL, dim=-1)
            out[row] = torch.einsum("hl,lhv->hv", probs_HL, values_LHV[:num_visible])
    return out
