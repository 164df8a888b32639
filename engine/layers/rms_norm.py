from __future__ import annotations

from types import ModuleType

import torch
from torch.nn import functional

from engine.kernels.support import has_kernels


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    On CPU torch decomposes its own rms_norm into five passes over memory; a vector norm and two products take
    a third of that time.
    """

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self.weight_D = weight_D
        self.eps = eps
        self._eps_tensor = torch.tensor(eps, dtype=torch.float32, device=weight_D.device)
        self._kernels = _load_kernels() if has_kernels(weight_D.device) else None

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and x_TD.dim() == 2:
            return self._kernels.rms_norm(x_TD, self.weight_D, self.eps)
        if x_TD.device.type != "cpu":
            return functional.rms_norm(x_TD, x_TD.shape[-1:], self.weight_D, self.eps)
        if x_TD.dtype == torch.float32:
            return torch.mul(x_TD, self._inverse_rms(x_TD)).mul_(self.weight_D)
        return (x_TD.float() * self._inverse_rms(x_TD)).to(x_TD.dtype).mul_(self.weight_D)

    def add_(self, x_TD: torch.Tensor, delta_TD: torch.Tensor) -> torch.Tensor:
        """x += delta in place; the norm of the sum."""
        if self._kernels is not None:
            return self._kernels.add_rms_norm_(x_TD, delta_TD, self.weight_D, self.eps)
        x_TD += delta_TD
        return self(x_TD)

    def apply_(self, x_TD: torch.Tensor) -> None:
        """In place; x_TD may be a slice of columns."""
        if x_TD.device.type == "cpu" and x_TD.dtype == torch.float32:
            x_TD.mul_(self._inverse_rms(x_TD)).mul_(self.weight_D)
        else:
            x_TD.copy_(self(x_TD))

    def _inverse_rms(self, x_TD: torch.Tensor) -> torch.Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self._eps_tensor, norm_T1, norm_T1, value=1.0 / x_TD.shape[-1]).rsqrt_()


def _load_kernels() -> ModuleType:
    from engine.kernels import rms_norm  # needs Triton, which a CPU has no use for

    return rms_norm
