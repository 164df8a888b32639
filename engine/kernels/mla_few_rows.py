# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Before and after the attention of few decodes. Before it: what mla_rows does, and the key expansion
absorbed into the query. After it: the shares of a context merged, and the value expansion. Both expansions'
weights are on their way before the kernel's inputs are there.

T tokens, one a sequence; H heads, C latent rank, N query dims without position, R rotated dims (interleaved
pairs), V value dims, P shares of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.attention_decode import Shares
from engine.kernels.dependent_launch import launch_options, signal, wait
from engine.kernels.mla_rows import rotate_queries, store_row
from engine.kernels.row_task import RowTask
from engine.kernels.support import is_power_of_two

MAX_ROWS = 4  # apart is faster at 8
_ABSORBED = 64  # latent dims of a program
_MERGE_PROGRAMS = 128  # wanted at least: about one for each multiprocessor
_MIN_VALUES, _MAX_VALUES = 16, 64  # dims of a program


def prepare_few_rows(
    task: RowTask,
    rows_TC: torch.Tensor,
    q_THQ: torch.Tensor,
    key_HNC: torch.Tensor,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    cache: torch.Tensor,
) -> torch.Tensor:
    """Queries [T, H, C + R] against cached rows, of q [T, H, N + R]; rows [T, C + R] (latent, shared key) go
    normed and rotated to their slots, as prepare_mla_rows has it. Neither rows nor q change."""
    num_tokens, num_heads, q_size = q_THQ.shape
    nope, rank = key_HNC.shape[1:]
    rope = q_size - nope
    assert is_power_of_two(rank) and is_power_of_two(rope) and is_power_of_two(nope)
    columns = min(_ABSORBED, rank)
    q_out_THC = q_THQ.new_empty(num_tokens, num_heads, rank + rope)
    _prepare_kernel[(num_tokens + num_heads * (rank // columns),)](
        rows_TC,
        q_THQ,
        key_HNC,
        q_out_THC,
        task.norm_weight_C,
        task.inverse_freq_R,
        positions_T,
        slot_mapping_T,
        cache,
        rows_TC.stride(0),
        q_THQ.stride(0),
        q_THQ.stride(1),
        num_heads,
        task.norm_eps,
        task.magnitude,
        TOKENS=num_tokens,
        NOPE=nope,
        RANK=rank,
        ROPE=rope,
        HEADS=triton.next_power_of_2(num_heads),
        COLUMNS=columns,
        num_warps=4,
        **launch_options(num_tokens),
    )
    return q_out_THC


def merge_and_expand(shares: Shares, value_HCV: torch.Tensor) -> torch.Tensor:
    """[T, H, V] in value's dtype: each head's merged latent times its value expansion."""
    num_tokens, num_heads, num_shares, rank = shares.parts_SHPC.shape
    num_values = value_HCV.shape[2]
    assert is_power_of_two(num_values) and value_HCV.is_contiguous()
    tiles = triton.next_power_of_2(triton.cdiv(_MERGE_PROGRAMS, num_tokens * num_heads))
    columns = min(max(min(_MIN_VALUES, num_values), num_values // tiles), _MAX_VALUES)
    out_THV = value_HCV.new_empty(num_tokens, num_heads, num_values)
    _expand_kernel[(num_values // columns, num_heads, num_tokens)](
        shares.parts_SHPC,
        shares.mass_SHP,
        value_HCV,
        out_THV,
        num_heads,
        num_shares,
        SHARES=triton.next_power_of_2(num_shares),
        RANK=rank,
        VALUE=num_values,
        COLUMNS=columns,
        num_warps=8,
        **launch_options(num_tokens),
    )
    return out_THV


@triton.jit
def _prepare_kernel(
    rows_ptr,
    q_ptr,
    key_ptr,
    q_out_ptr,
    weight_ptr,
    freq_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    rows_stride,
    q_stride_t,
    q_stride_h,
    num_heads,
    eps,
    magnitude,
    TOKENS: tl.constexpr,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    pid = tl.program_id(0)
    if pid < TOKENS:
        wait(DEPENDENT)
        q_out = q_out_ptr + pid * num_heads * (RANK + ROPE) + RANK
        row = rows_ptr + pid * rows_stride
        cos, sin = store_row(
            row, weight_ptr, freq_ptr, positions_ptr, slots_ptr, cache_ptr, pid, eps, magnitude, RANK, ROPE
        )
        q = q_ptr + pid * q_stride_t + NOPE
        rotate_queries(q, q_out, q_stride_h, RANK + ROPE, num_heads, cos, sin, HEADS, ROPE)
    else:
        tile = pid - TOKENS
        head = tile // (RANK // COLUMNS)
        columns = tile % (RANK // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
        dims = tl.arange(0, NOPE)
        key = tl.load(key_ptr + (head * NOPE + dims[:, None]) * RANK + columns[None, :])
        wait(DEPENDENT)
        key = key.to(tl.float32)
        for t in tl.static_range(TOKENS):
            query = tl.load(q_ptr + t * q_stride_t + head * q_stride_h + dims).to(tl.float32)
            absorbed = tl.sum(query[:, None] * key, 0)
            out = q_out_ptr + (t * num_heads + head) * (RANK + ROPE) + columns
            tl.store(out, absorbed.to(q_out_ptr.dtype.element_ty))


@triton.jit
def _expand_kernel(
    parts_ptr,
    mass_ptr,
    value_ptr,
    out_ptr,
    num_heads,
    num_shares,
    SHARES: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    signal(DEPENDENT)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1)
    place = tl.program_id(2).to(tl.int64) * num_heads + head
    dims = tl.arange(0, RANK)
    value = tl.load(value_ptr + (head * RANK + dims[:, None]) * VALUE + columns[None, :])
    wait(DEPENDENT)
    shares = tl.arange(0, SHARES)
    mass = tl.load(mass_ptr + place * num_shares + shares, mask=shares < num_shares, other=-float("inf"))
    largest = tl.max(mass, 0)
    weights = tl.exp2(mass - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    parts = parts_ptr + (place * num_shares + shares[:, None]) * RANK + dims[None, :]
    values = tl.load(parts, mask=(weights > 0)[:, None], other=0.0)
    latent = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out = tl.sum(latent[:, None] * value.to(tl.float32), 0)
    tl.store(out_ptr + place * VALUE + columns, out.to(out_ptr.dtype.element_ty))
