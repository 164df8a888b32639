# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The weighted sum of a token's expert results, and its way on: T tokens, K experts a token, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def combine_pairs(y_PD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """out_TD = sum over k of weights[t, k] * y[t * K + k] in float32, in the order of k."""
    num_tokens, k = weights_TK.shape
    hidden = y_PD.shape[1]
    out_TD = y_PD.new_empty(num_tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y_PD, weights_TK, out_TD, hidden, K=k, BLOCK=block, num_warps=4
    )
    return out_TD


def combine_pairs_reference(y_PD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    num_tokens, k = weights_TK.shape
    y_TKD = y_PD.view(num_tokens, k, -1).float()
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(1).to(y_PD.dtype)


@triton.jit
def _combine_kernel(y_ptr, weights_ptr, out_ptr, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_dim = dims < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        y = tl.load(y_ptr + (t * K + k) * hidden + dims, mask=is_dim, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + t * K + k) * y
    tl.store(out_ptr + t * hidden + dims, total.to(out_ptr.dtype.element_ty), mask=is_dim)
