# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""The expert products of a single token without matrix units: each program reads a few whole rows of an
expert's weight at once. Those of the shared experts, which every token needs, are on their way before the
gate has chosen.

K experts of the token (with shared ones), D hidden, I intermediate, E routed experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.few_rows import MAX_DEPTH, FewRowsTile
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gemm import ExpertWeights


def multiply_up_gate_one(
    x_1D: torch.Tensor, weights: ExpertWeights, ids_1K: torch.Tensor, spec: GateSpec, tile: FewRowsTile
) -> torch.Tensor:
    """[K, I]: up(x) * silu(gate(x)) of expert ids[0, k] in row k; ids as in a Choice."""
    out_KI = x_1D.new_empty(spec.experts_per_token, weights.down.shape[2])
    _launch(x_1D, weights.up_gate, ids_1K, out_KI, spec, tile, is_gated=True)
    return out_KI


def multiply_down_one(
    h_KI: torch.Tensor, weights: ExpertWeights, ids_1K: torch.Tensor, spec: GateSpec, tile: FewRowsTile
) -> torch.Tensor:
    """[K, D]: down(h[k]) of expert ids[0, k] in row k."""
    out_KD = h_KI.new_empty(spec.experts_per_token, weights.down.shape[1])
    _launch(h_KI, weights.down, ids_1K, out_KD, spec, tile, is_gated=False)
    return out_KD


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    ids_1K: torch.Tensor,
    out: torch.Tensor,
    spec: GateSpec,
    tile: FewRowsTile,
    *,
    is_gated: bool,
) -> None:
    assert ids_1K.shape[0] == 1 and x.is_contiguous() and w.is_contiguous()
    num_out, depth = out.shape[1], w.shape[2]
    _one_token_kernel[(triton.cdiv(num_out, tile.outputs), spec.experts_per_token)](
        x,
        w,
        ids_1K,
        out,
        num_out,
        depth,
        IS_GATED=is_gated,
        E=spec.num_experts,
        SHARED=spec.num_shared,
        TOP_K=spec.top_k,
        OUTPUTS=tile.outputs,
        BLOCK=min(MAX_DEPTH, triton.next_power_of_2(depth)),
        num_warps=tile.num_warps,
        **launch_options(1),
    )


@triton.jit
def _one_token_kernel(
    x_ptr,
    w_ptr,
    ids_ptr,
    out_ptr,
    num_out,
    depth,
    IS_GATED: tl.constexpr,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """w [experts, num_out, depth], or twice as many rows if gated: first up's, then gate's. Only the second
    product has a row of x for each expert."""
    signal(DEPENDENT)
    # The shared experts' programs start first; in ids they are last.
    m = tl.program_id(1)
    k = TOP_K + m
    expert = E + m
    if m >= SHARED:
        wait(DEPENDENT)
        k = m - SHARED
        expert = tl.load(ids_ptr + k)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_out
    ds = tl.arange(0, BLOCK)
    w_rows = num_out * 2 if IS_GATED else num_out
    w = w_ptr + (expert.to(tl.int64) * w_rows + outputs)[:, None] * depth + ds[None, :]
    x = x_ptr + ds if IS_GATED else x_ptr + k * depth + ds
    total = tl.zeros((OUTPUTS,), tl.float32)
    total_gate = tl.zeros((OUTPUTS,), tl.float32)
    for d in range(0, depth, BLOCK):
        is_d = ds < depth - d
        mask = is_output[:, None] & is_d[None, :]
        w_block = tl.load(w + d, mask=mask, other=0.0)
        if IS_GATED:
            gate = tl.load(w + num_out.to(tl.int64) * depth + d, mask=mask, other=0.0)
        wait(DEPENDENT)
        x_block = tl.load(x + d, mask=is_d, other=0.0).to(tl.float32)
        total += tl.sum(w_block.to(tl.float32) * x_block[None, :], 1)
        if IS_GATED:
            total_gate += tl.sum(gate.to(tl.float32) * x_block[None, :], 1)
    if IS_GATED:
        total = total * total_gate / (1.0 + tl.exp(-total_gate))
    tl.store(out_ptr + k * num_out + outputs, total.to(out_ptr.dtype.element_ty), mask=is_output)
