from __future__ import annotations

import torch

_MAX_QUERY_ROWS = 64


def attend_causal(q_KGnQ: torch.Tensor, k_KLQ: torch.Tensor, v_KLV: torch.Tensor) -> torch.Tensor:
    """[K, G, n, V]: attention of the last n tokens of a context of L, so query i sees rows 0 .. L - n + i.

    K key heads serve G queries each; queries carry the scale. Queries are taken in blocks, each against the
    rows that it can see: nothing of the size n x L is made, little that is invisible is multiplied.
    """
    num_kv_heads, group, num_queries, _ = q_KGnQ.shape
    num_hidden = k_KLQ.shape[1] - num_queries
    out = q_KGnQ.new_empty(num_kv_heads, group, num_queries, v_KLV.shape[-1])
    for start in range(0, num_queries, _MAX_QUERY_ROWS):
        end = min(start + _MAX_QUERY_ROWS, num_queries)
        visible = num_hidden + end
        scores = torch.bmm(q_KGnQ[:, :, start:end].flatten(1, 2), k_KLQ[:, :visible].transpose(1, 2))
        if end - start > 1:
            corner = scores.unflatten(1, (group, end - start))[..., visible - (end - start) :]
            corner += _future_bias(end - start, scores)
        probs = torch.softmax(scores, dim=-1)
        out[:, :, start:end] = torch.bmm(probs, v_KLV[:, :visible]).unflatten(1, (group, end - start))
    return out


def _future_bias(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
