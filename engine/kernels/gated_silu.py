# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dependent_launch import launch_options, signal, wait


def gated_silu_rows(up_gate_TI: torch.Tensor) -> torch.Tensor:
    """[T, up | gate] -> up * gate * sigmoid(gate), computed in float32: the rule of layers.mlp.gated_silu."""
    num_tokens, width = up_gate_TI.shape
    out_TI = up_gate_TI.new_empty(num_tokens, width // 2)
    block = min(1024, triton.next_power_of_2(width // 2))
    if num_tokens:
        grid = (num_tokens, triton.cdiv(width // 2, block))
        options = launch_options(num_tokens)
        _silu_kernel[grid](up_gate_TI, out_TI, width // 2, BLOCK=block, num_warps=4, **options)
    return out_TI


@triton.jit
def _silu_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    signal(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    row = x_ptr + t * 2 * size + columns
    up = tl.load(row, mask=is_column, other=0.0).to(tl.float32)
    gate = tl.load(row + size, mask=is_column, other=0.0).to(tl.float32)
    out = up * gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + t * size + columns, out.to(out_ptr.dtype.element_ty), mask=is_column)
