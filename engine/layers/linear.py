"""A matrix product with its weight laid out for this processor.

Off the CPU a weight stays as the hub has it, and one or two rows have a kernel of their own. On CPU the
hub's [N, K] layout is the slowest of three (docs/log.md). For one or two rows a [K, N] copy reads memory
fastest. For more rows oneDNN's packed form multiplies up to 1.7 times as fast, but a call costs 55 us. So
small weights are kept as [K, N], large ones packed, and middle ones both ways: twice their memory for the
speed of a single stream. The choice depends on shape, dtype and processor alone, so that equal workers
compute equal bits.
"""

from __future__ import annotations

from types import ModuleType

import torch

from engine.kernels.support import has_kernels

_MIN_PACKED_ELEMENTS = (1 << 18) + 1
_MAX_DOUBLE_ELEMENTS = 1 << 22
_MAX_FEW_ROWS = 2


class Linear:
    """y = x @ weight.T + bias. Keeps its own copy of the weight."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self._num_outputs = weight_NK.shape[0]
        self._bias_N = bias_N
        self._packed: torch.Tensor | None = None
        self._weight_KN: torch.Tensor | None = None
        self._kernels: ModuleType | None = None
        if weight_NK.device.type != "cpu":
            self._weight_KN = weight_NK.contiguous().t()  # as it is: cuBLAS takes either layout
            if has_kernels(weight_NK.device) and bias_N is None and weight_NK.dtype != torch.float32:
                self._kernels = _load_kernels()
            return
        if _is_packing_faster(weight_NK):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)
        if self._packed is None or _is_worth_doubling(weight_NK):
            self._weight_KN = weight_NK.t().contiguous()

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        num_rows = x_TK.shape[0]
        if self._kernels is not None and self._weight_KN is not None and num_rows <= self._kernels.MAX_ROWS:
            return self._kernels.multiply_few_rows(x_TK, self._weight_KN.t())
        if self._weight_KN is not None and (num_rows <= _MAX_FEW_ROWS or self._packed is None):
            if self._bias_N is None:
                return torch.mm(x_TK, self._weight_KN)
            return torch.addmm(self._bias_N, x_TK, self._weight_KN)
        if num_rows == 0:
            return x_TK.new_empty(0, self._num_outputs)
        return torch.ops.mkldnn._linear_pointwise(x_TK, self._packed, self._bias_N, "none", [], "")

    def into(self, out_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        """Write the product to out_TN, which may be a slice of a larger tensor's rows."""
        has_kernel = self._kernels is not None and x_TK.shape[0] <= self._kernels.MAX_ROWS
        if has_kernel and self._kernels is not None and self._weight_KN is not None:
            self._kernels.multiply_few_rows(x_TK, self._weight_KN.t(), out_TN)
        elif self._packed is None and self._bias_N is None and self._weight_KN is not None:
            torch.mm(x_TK, self._weight_KN, out=out_TN)
        else:
            out_TN.copy_(self(x_TK))


def _is_packing_faster(weight_NK: torch.Tensor) -> bool:
    if weight_NK.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight_NK.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_NK.dtype == torch.float32 and weight_NK.numel() >= _MIN_PACKED_ELEMENTS


def _is_worth_doubling(weight_NK: torch.Tensor) -> bool:
    """bf16 has a fast packed form for few rows too."""
    return weight_NK.dtype == torch.float32 and weight_NK.numel() <= _MAX_DOUBLE_ELEMENTS


def _load_kernels() -> ModuleType:
    from engine.kernels import few_rows  # needs Triton, which a CPU has no use for

    return few_rows
