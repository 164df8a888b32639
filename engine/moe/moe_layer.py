from __future__ import annotations

from copy import copy
from typing import Protocol, Self, runtime_checkable

import torch

from engine.layers.mlp import GatedMlp
from engine.moe.dispatch import Dispatcher
from engine.moe.experts import Experts
from engine.moe.gate import Gate


@runtime_checkable
class CountsExperts(Protocol):
    """A feed-forward layer of experts, however it computes them."""

    def take_load(self) -> torch.Tensor:
        """int64 [E]: tokens by logical expert since the last call."""
        ...

    def uncounted(self) -> Self:
        """The same layer, whose tokens count nowhere."""
        ...

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor: ...


class MoeLayer:
    """gate -> dispatch -> experts -> combine, plus the shared experts. Counts tokens by logical expert."""

    def __init__(
        self, gate: Gate, dispatcher: Dispatcher, experts: Experts, shared: GatedMlp | None, num_experts: int
    ) -> None:
        self._gate = gate
        self._dispatcher = dispatcher
        self._experts = experts
        self._shared = shared
        self._num_experts = num_experts
        self._load_E: torch.Tensor | None = None

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self._gate(x_TD)
        self._count(ids_TK)
        routed = self._dispatcher.dispatch(x_TD, ids_TK)
        y_RD = self._experts(routed.x_RD, routed.num_tokens_per_expert)
        out_TD = self._dispatcher.combine(y_RD, weights_TK, routed)
        return out_TD if self._shared is None else out_TD.add_(self._shared(x_TD))

    def _count(self, ids_TK: torch.Tensor) -> None:
        load_E = torch.bincount(ids_TK.reshape(-1), minlength=self._num_experts)
        self._load_E = load_E if self._load_E is None else self._load_E.add_(load_E)

    def take_load(self) -> torch.Tensor:
        """int64 [E] since the last call."""
        load_E, self._load_E = self._load_E, None
        return torch.zeros(self._num_experts, dtype=torch.int64) if load_E is None else load_E

    def uncounted(self) -> Self:
        other = copy(self)
        other._load_E = None
        return other
