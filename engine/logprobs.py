"""Logprobs of tokens under the model's own distribution."""

from __future__ import annotations

import torch

from engine.outputs import TokenLogprobs


def token_logprobs(
    logprobs_NV: torch.Tensor, token_ids: list[int], num_top: list[int]
) -> list[TokenLogprobs]:
    """Row n: of token_ids[n], and of its num_top[n] likeliest tokens. logprobs are log_softmax of raw
    logits."""
    chosen_N1 = torch.tensor(token_ids, device=logprobs_NV.device).unsqueeze(1)
    chosen = logprobs_NV.gather(1, chosen_N1).squeeze(1).tolist()
    most = min(max(num_top), logprobs_NV.shape[1])
    top_values, top_ids = logprobs_NV.topk(most, dim=1) if most else (chosen_N1[:, :0], chosen_N1[:, :0])
    return [
        TokenLogprobs(token_id, logprob, tuple(ids[:count]), tuple(values[:count]))
        for token_id, logprob, ids, values, count in zip(
            token_ids, chosen, top_ids.tolist(), top_values.tolist(), num_top, strict=True
        )
    ]
