from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from engine.layers.linear import Linear
from engine.layers.mlp import gated_silu
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import interleave_rows, rotate_

LARGE = (8448, 512)  # packed only, where there is a packed form
MIDDLE = (1024, 512)  # both layouts
SMALL = (24, 16)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_torch(
    shape: tuple[int, int], has_bias: bool, num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype) / shape[1] ** 0.5
    bias = torch.randn(shape[0], dtype=dtype) if has_bias else None
    x = torch.randn(num_rows, shape[1], dtype=dtype)
    out = torch.empty(num_rows + 2, shape[0], dtype=dtype)
    linear = Linear(weight, bias)
    expected = functional.linear(x, weight, bias)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}

    linear.into(out[1:-1], x)

    torch.testing.assert_close(linear(x), expected, **tolerance)
    torch.testing.assert_close(out[1:-1], expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32).to(dtype)
    x = (torch.randn(5, 40) * 1e-3).to(dtype)  # small enough for eps to count
    norm = RmsNorm(weight, 1e-6)
    expected = functional.rms_norm(x[:, :32], (32,), weight, 1e-6)

    torch.testing.assert_close(norm(x[:, :32]), expected)

    untouched = x[:, 32:].clone()
    norm.apply_(x[:, :32])
    torch.testing.assert_close(x[:, :32], expected)
    assert torch.equal(x[:, 32:], untouched)


def test_gated_silu_reads_up_then_gate() -> None:
    up, gate = torch.randn(4, 3), torch.randn(4, 3)

    torch.testing.assert_close(gated_silu(torch.cat((up, gate), dim=-1)), functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_rotation_is_the_same_whatever_the_memory_layout(dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(3, 4)
    buffer = torch.randn(3, 8 + offset + 1).to(dtype)
    x = buffer[:, offset : offset + 8]
    even, odd = x.float()[:, 0::2].clone(), x.float()[:, 1::2].clone()

    rotate_(x, torch.polar(torch.ones_like(angles), angles))

    expected = torch.stack(
        (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1
    )
    torch.testing.assert_close(x, expected.flatten(1).to(dtype))


def test_interleaving_pairs_rows_of_both_halves() -> None:
    assert interleave_rows(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]
