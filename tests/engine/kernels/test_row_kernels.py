"""Norms, activations and dense products against their references."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoint import fp8
from engine.layers.mlp import gated_silu

pytest.importorskip("triton", reason="the kernels need triton")

from engine.kernels.few_rows import MAX_ROWS, FewRowsTile, multiply_few_rows
from engine.kernels.fp8_quantise import quantise_rows
from engine.kernels.gated_silu import gated_silu_rows
from engine.kernels.linear import multiply_fp8
from engine.kernels.linear_tiles import LinearTile
from engine.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_reference

FP8_ERROR = 0.05 if torch.cuda.is_available() else 0.12  # Triton's interpreter rounds to FP8 badly


@pytest.mark.parametrize("hidden", [64, 100, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum_leaves_the_sum(hidden: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, hidden, dtype=dtype, device=device)
    delta = torch.randn(5, hidden + 8, dtype=dtype, device=device)[:, :hidden]
    weight = torch.rand(hidden, dtype=dtype, device=device)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    alone = rms_norm(delta, weight, 1e-6)
    torch.testing.assert_close(alone, rms_norm_reference(delta, weight, 1e-6), **tolerance)
    total = x + delta

    normed = add_rms_norm_(x, delta, weight, 1e-6)

    torch.testing.assert_close(x, total, rtol=0.01 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(normed, rms_norm_reference(x, weight, 1e-6), **tolerance)


def test_norm_of_no_rows_is_empty(device: str) -> None:
    assert rms_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-6).shape == (0, 64)


@pytest.mark.parametrize("width", [6, 200])
def test_gated_silu_equals_the_layer(width: int, device: str) -> None:
    x = torch.randn(7, width, device=device)
    torch.testing.assert_close(gated_silu_rows(x), gated_silu(x.clone()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantises_inside", [True, False])
@pytest.mark.parametrize("num_out", [128, 320])
def test_fp8_product_is_near_the_dequantised_one(quantises_inside: bool, num_out: int, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 256, dtype=torch.bfloat16, device=device)
    weight = torch.randn(num_out, 256, device=device)
    value, scale = fp8.quantise(weight, (128, 128))

    found = multiply_fp8(x, value, scale, LinearTile(16, 64, 128, 4, 2, 1, quantises_inside))

    expected = x.float() @ fp8.dequantise(value, scale, (128, 128), torch.float32).t()
    assert (found.float() - expected).norm() / expected.norm() < FP8_ERROR


@pytest.mark.parametrize("num_rows", range(MAX_ROWS + 1))
@pytest.mark.parametrize("depth", [384, 4480])
def test_few_rows_times_fp8_weights_are_not_quantised(num_rows: int, depth: int, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, depth + 8, dtype=torch.bfloat16, device=device)[:, :depth]
    value, scale = fp8.quantise(torch.randn(261, depth, device=device), (128, 128))

    found = multiply_fp8(x, value, scale)

    expected = x.float() @ fp8.dequantise(value, scale, (128, 128), torch.float32).t()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize(("num_rows", "multiple"), [(5, 4), (8, 4), (3, 1)])
def test_scales_by_group_are_those_by_row(num_rows: int, multiple: int, device: str) -> None:
    x = torch.randn(num_rows, 3 * 128 + 8, dtype=torch.bfloat16, device=device)[:, : 3 * 128]
    plain = quantise_rows(x)

    by_group = quantise_rows(x, multiple=multiple, is_by_group=True)

    assert by_group.values.shape[0] == by_group.scales.shape[0] == -(-num_rows // multiple) * multiple
    assert by_group.scales.stride() == (1, by_group.scales.shape[0])
    assert torch.equal(by_group.values[:num_rows].float(), plain.values.float())
    assert torch.equal(by_group.scales[:num_rows], plain.scales)


@pytest.mark.parametrize("num_rows", range(MAX_ROWS + 1))
@pytest.mark.parametrize("depth", [96, 5000])
def test_few_rows_without_matrix_units(num_rows: int, depth: int, device: str) -> None:
    x = torch.randn(num_rows, depth + 8, dtype=torch.bfloat16, device=device)[:, :depth]
    weight = torch.randn(25, depth, dtype=torch.bfloat16, device=device)

    found = multiply_few_rows(x, weight)

    expected = x.float() @ weight.float().t()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=0.05)
    out = torch.empty(num_rows, 60, dtype=torch.bfloat16, device=device)[:, :25]
    assert multiply_few_rows(x, weight, out, FewRowsTile(4, 4)) is out
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=0.05)
