"""Logprobs of tokens under the model's own distribution."""

from __future__ import annotations

import torch

from engine.outputs import TokenLogprobs


def token_logprobs(logits_NV: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Row n: of token_ids[n], and of its num_top[n] likeliest tokens. Logits are as the model gave them."""
    log_mass_N1 = logits_NV.logsumexp(1, keepdim=True)
    chosen_N1 = torch.tensor(token_ids, device=logits_NV.device).unsqueeze(1)
    chosen: list[float] = (logits_NV.gather(1, chosen_N1) - log_mass_N1).squeeze(1).tolist()
    most = min(max(num_top), logits_NV.shape[1])
    top_values, top_ids = logits_NV.topk(most, dim=1)
    return [
        TokenLogprobs(token_id, logprob, tuple(ids[:count]), tuple(values[:count]))
        for token_id, logprob, ids, values, count in zip(
            token_ids, chosen, top_ids.tolist(), (top_values - log_mass_N1).tolist(), num_top, strict=True
        )
    ]
