"""A matrix product with a weight laid out for this processor.

On CPU in fp32 the hub's [N, K] layout is the slowest of the three that torch offers: a [K, N] copy is faster
at every number of rows, and oneDNN's packed form is up to twice as fast again for large weights, but costs
55 us a call on an AVX2 machine (docs/log.md). The choice depends on shape, dtype and processor alone, so that
equal workers compute equal bits.
"""

from __future__ import annotations

import torch

_MIN_PACKED_ELEMENTS = {"AVX2": 1 << 21, "AVX512": 1 << 16}


class Linear:
    """y = x @ weight.T + bias. Keeps its own copy of the weight, in the fastest layout."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self._bias_N = bias_N
        self._is_packed = _is_packing_faster(weight_NK)
        self._weight = _pack(weight_NK) if self._is_packed else weight_NK.t().contiguous()

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self._is_packed and x_TK.shape[0] > 0:
            return torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias_N, "none", [], "")
        if self._is_packed:
            return x_TK.new_empty(0, self._weight.shape[0])
        if self._bias_N is not None:
            return torch.addmm(self._bias_N, x_TK, self._weight)
        return torch.mm(x_TK, self._weight)

    def into(self, out_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        """Write the product to out_TN, which may be a slice of a larger tensor's rows."""
        if self._is_packed or self._bias_N is not None:
            out_TN.copy_(self(x_TK))
        else:
            torch.mm(x_TK, self._weight, out=out_TN)


def _is_packing_faster(weight_NK: torch.Tensor) -> bool:
    if weight_NK.device.type != "cpu" or weight_NK.dtype not in (torch.float32, torch.bfloat16):
        return False
    if weight_NK.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    min_elements = _MIN_PACKED_ELEMENTS.get(torch.backends.cpu.get_cpu_capability())
    return min_elements is not None and weight_NK.numel() >= min_elements


def _pack(weight_NK: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)
