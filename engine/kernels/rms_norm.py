# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""RMS norm of rows, alone or of a sum that it also leaves behind. T tokens, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait

_ONE_WARP = 1024  # columns that four warps are enough for


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Of the last dimension, in x's dtype; x may be a slice of columns."""
    return _launch(x_TD, None, weight_D, eps)


def add_rms_norm_(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += delta in place, rounded to its dtype; the norm of that sum."""
    return _launch(x_TD, delta_TD, weight_D, eps)


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_D.float()).to(x_TD.dtype)


def _launch(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    num_tokens, hidden = x_TD.shape
    out_TD = torch.empty(num_tokens, hidden, dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens == 0:
        return out_TD
    assert x_TD.stride(1) == 1 and (delta_TD is None or delta_TD.stride(1) == 1)
    block = triton.next_power_of_2(hidden)
    _norm_kernel[(num_tokens,)](
        x_TD,
        delta_TD,
        weight_D,
        out_TD,
        hidden,
        x_TD.stride(0),
        0 if delta_TD is None else delta_TD.stride(0),
        eps,
        HAS_DELTA=delta_TD is not None,
        BLOCK=block,
        num_warps=4 if block <= _ONE_WARP else 8,
        **launch_options(num_tokens),
    )
    return out_TD


@triton.jit
def _norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    hidden,
    x_stride,
    delta_stride,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    is_dim = dims < hidden
    weight = tl.load(weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    x = tl.load(x_ptr + t * x_stride + dims, mask=is_dim, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + t * delta_stride + dims, mask=is_dim, other=0.0).to(tl.float32)
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + t * x_stride + dims, total, mask=is_dim)
        x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps) * weight
    tl.store(out_ptr + t * hidden + dims, normed.to(out_ptr.dtype.element_ty), mask=is_dim)
