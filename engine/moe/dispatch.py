"""Sending tokens to the ranks that hold their experts, and the results back.

T tokens of this rank, K experts per token, R rows received by this rank's experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class Routed:
    """Rows for the experts of this rank, and what its dispatcher needs to bring them home."""

    x_RD: torch.Tensor  # sorted by local expert
    num_tokens_per_expert: list[int]  # in the order of Dispatcher.local_experts; sums to R
    origin_TK: torch.Tensor  # int64, dispatcher's own: where the result of (token, k) is found


class Dispatcher(Protocol):
    """Stateless between calls, so one dispatcher may serve all MoE layers of a model."""

    local_experts: range  # logical expert ids whose weights live on this rank

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> Routed:
        """Zero tokens are allowed: other ranks may still send rows here."""
        ...

    def combine(self, y_RD: torch.Tensor, weights_TK: torch.Tensor, routed: Routed) -> torch.Tensor:
        """out_TD: for each of this rank's tokens sum_k weights[t, k] * y(t, k), in the order of k, so that
        the number of ranks does not change the result. y_RD: the results of routed.x_RD, in its order."""
        ...


class LocalDispatcher:
    """All experts live here: dispatch is a sort."""

    def __init__(self, num_experts: int) -> None:
        self.local_experts = range(num_experts)

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> Routed:
        num_tokens, k = expert_ids_TK.shape
        flat_ids = expert_ids_TK.reshape(-1)
        order_R = torch.argsort(flat_ids, stable=True)
        origin = torch.empty_like(order_R)
        origin[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        counts = torch.bincount(flat_ids, minlength=len(self.local_experts))
        return Routed(
            x_RD=x_TD.index_select(0, order_R.div(k, rounding_mode="floor")),
            num_tokens_per_expert=counts.tolist(),
            origin_TK=origin.view(num_tokens, k),
        )

    def combine(self, y_RD: torch.Tensor, weights_TK: torch.Tensor, routed: Routed) -> torch.Tensor:
        return weigh_and_sum(y_RD, weights_TK, routed.origin_TK)


def weigh_and_sum(y_RD: torch.Tensor, weights_TK: torch.Tensor, origin_TK: torch.Tensor) -> torch.Tensor:
    """out_TD = sum over k of weights[t, k] * y[origin[t, k]], accumulated in the order of k."""
    num_tokens, k = origin_TK.shape
    y_TKD = y_RD.index_select(0, origin_TK.reshape(-1)).view(num_tokens, k, y_RD.shape[-1])
    return torch.bmm(weights_TK.to(y_RD.dtype).unsqueeze(1), y_TKD).squeeze(1)
