"""Muon (K. Jordan et al., 2024): momentum whose matrix is made orthogonal before it is applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

# The quintic of the authors: it need not converge to 1, only bring all singular values near it quickly.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon:
    """For parameters of two dimensions, or stacks of such in three. One product serves all of one shape."""

    def __init__(self, parameters: Sequence[torch.Tensor], momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        self._groups = list(by_shape.values())
        self._momentum = momentum
        self._averages = [torch.zeros_like(torch.stack(group)) for group in self._groups]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        for group, average in zip(self._groups, self._averages, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            average.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(average, self._momentum))
            height, width = update.shape[-2:]
            torch._foreach_mul_(group, 1 - rate * decay)
            scaled = update.float() * (-rate * max(1.0, height / width) ** 0.5)
            torch._foreach_add_(group, list(scaled.unbind(0)))


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About U V^T of the singular value decomposition of [..., height, width]: Newton-Schulz in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
