# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The weighted sum of a token's expert results, alone or on its way through the residual sum into the next
layer's norm: T tokens, K experts a token, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait


def combine_pairs(y_PD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """out_TD = sum over k of weights[t, k] * y[t * K + k] in float32, in the order of k."""
    num_tokens, k = weights_TK.shape
    hidden = y_PD.shape[1]
    out_TD = y_PD.new_empty(num_tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y_PD, weights_TK, out_TD, hidden, K=k, BLOCK=block, num_warps=4, **launch_options(num_tokens)
    )
    return out_TD


def combine_into_norm_(
    y_PD: torch.Tensor, weights_TK: torch.Tensor, x_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += combine_pairs(y, weights) in place, rounded as apart; the norm of that sum."""
    num_tokens, k = weights_TK.shape
    hidden = y_PD.shape[1]
    assert x_TD.is_contiguous()
    out_TD = torch.empty_like(x_TD)
    block = triton.next_power_of_2(hidden)
    _combine_norm_kernel[(num_tokens,)](
        y_PD,
        weights_TK,
        x_TD,
        norm_weight_D,
        out_TD,
        hidden,
        eps,
        K=k,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
        **launch_options(num_tokens),
    )
    return out_TD


def combine_pairs_reference(y_PD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    num_tokens, k = weights_TK.shape
    y_TKD = y_PD.view(num_tokens, k, -1).float()
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(1).to(y_PD.dtype)


@triton.jit
def _combine_kernel(
    y_ptr, weights_ptr, out_ptr, hidden, K: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    signal(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_dim = dims < hidden
    total = _weighted_sum(y_ptr, weights_ptr, t, dims, is_dim, hidden, K, BLOCK)
    tl.store(out_ptr + t * hidden + dims, total.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit
def _combine_norm_kernel(
    y_ptr,
    weights_ptr,
    x_ptr,
    norm_weight_ptr,
    out_ptr,
    hidden,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    is_dim = dims < hidden
    norm_weight = tl.load(norm_weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    place = x_ptr + t * hidden + dims
    x = tl.load(place, mask=is_dim, other=0.0)
    fed = _weighted_sum(y_ptr, weights_ptr, t, dims, is_dim, hidden, K, BLOCK).to(x.dtype)
    total = (x.to(tl.float32) + fed.to(tl.float32)).to(x.dtype)
    tl.store(place, total, mask=is_dim)
    x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps) * norm_weight
    tl.store(out_ptr + t * hidden + dims, normed.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit
def _weighted_sum(y_ptr, weights_ptr, t, dims, is_dim, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    """float32, of some dims of token t."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        y = tl.load(y_ptr + (t * K + k) * hidden + dims, mask=is_dim, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + t * K + k) * y
    return total
