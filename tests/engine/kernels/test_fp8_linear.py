"""Dense layers in FP8: who multiplies, and what becomes of a library that cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from engine.checkpoint import fp8
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.weights import open_weights
from engine.layers import fp8_linear
from engine.layers.fp8_linear import Fp8Linear, make_fp8_linear
from engine.layers.linear import Linear
from engine.layers.mlp import load_gated_mlp
from engine.models.deepseek import build_deepseek
from engine.moe.dispatch import LocalDispatcher

pytest.importorskip("triton", reason="the kernels need triton")

MAX_ERROR = 0.05 if torch.cuda.is_available() else 0.12  # Triton's interpreter rounds to FP8 badly


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A library's product that takes what cuBLAS takes, and where layers find it; rows of each call."""
    calls: list[int] = []

    def scaled_mm(a: Any, b: Any, scale_a: Any, kind_a: Any, scale_b: Any, kind_b: Any, **how: Any) -> Any:
        kinds = functional.ScalingType
        assert (kind_a, kind_b) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
        assert a.shape[0] % 4 == 0 and a.shape[1] % 512 == 0
        assert scale_a.stride() == (1, a.shape[0]) and b.stride(0) == 1
        rows = fp8.dequantise(a, scale_a, (1, 128), torch.float32)
        weight = fp8.dequantise(b.t(), scale_b.t(), (128, 128), torch.float32)
        calls.append(a.shape[0])
        return (rows @ weight.t()).to(how["output_dtype"])

    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_linear, "_MAX_KERNEL_ROWS", 6)
    monkeypatch.setattr(fp8_linear, "_has_library", lambda device: True)
    monkeypatch.setattr(fp8_linear, "_MAX_ERROR", MAX_ERROR)
    fp8_linear._library_works.cache_clear()
    yield calls
    fp8_linear._library_works.cache_clear()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("num_rows", "depth", "by_library"),
    [(1, 512, []), (6, 512, []), (7, 512, [8]), (12, 512, [12]), (12, 384, [])],
)
def test_many_rows_are_the_librarys(
    num_rows: int, depth: int, by_library: list[int], library: list[int], device: str
) -> None:
    """If it takes so many scales of inputs."""
    torch.manual_seed(0)
    weight = torch.randn(200, depth, device=device)
    x = torch.randn(num_rows, depth, dtype=torch.bfloat16, device=device)
    linear = Fp8Linear(weight)
    library.clear()  # the trial's

    found = linear(x)

    assert library == by_library
    assert found.shape == (num_rows, 200)
    assert relative_error(found, x.float() @ weight.t()) < 0.04 + MAX_ERROR


def refuse(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")


def be_wrong(a: torch.Tensor, b: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.ones(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)


@pytest.mark.parametrize(("product", "reason"), [(refuse, "NOT_SUPPORTED"), (be_wrong, "an error of")])
def test_a_library_that_cannot_is_left_alone_with_one_warning(
    product: Callable[..., torch.Tensor],
    reason: str,
    library: list[int],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(functional, "scaled_mm", product)
    weight = torch.randn(128, 512, device=device)
    x = torch.randn(9, 512, dtype=torch.bfloat16, device=device)
    layers = [Fp8Linear(weight), Fp8Linear(weight)]

    found = layers[1](x)

    assert relative_error(found, x.float() @ weight.t()) < 0.04 + MAX_ERROR
    assert len(caplog.records) == 1 and reason in caplog.text


def test_biases_and_odd_inputs_keep_a_layer_as_it_is() -> None:
    assert isinstance(make_fp8_linear(torch.ones(8, 128), torch.ones(8)), Linear)
    assert isinstance(make_fp8_linear(torch.ones(8, 100)), Linear)


class Weights:
    def __init__(self, device: str) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, device=self._device) / shape[-1] ** 0.5
        return values.to(dtype or torch.bfloat16)

    def has(self, name: str) -> bool:
        return True


def test_a_gated_mlp_in_fp8_is_near_the_exact_one(device: str) -> None:
    x = torch.randn(5, 128, dtype=torch.bfloat16, device=device)
    exact = load_gated_mlp(Weights(device), "mlp", 128, 256, False)(x)

    found = load_gated_mlp(Weights(device), "mlp", 128, 256, False, make_fp8_linear)(x)

    assert 0 < relative_error(found, exact.float()) < 0.05 + MAX_ERROR


def test_attention_and_dense_mlps_of_a_model_are_fp8(tmp_path: Path) -> None:
    config = hub_config("deepseek_v2", "tiny", "float32")
    config |= {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "v_head_dim": 32}
    config |= {"moe_intermediate_size": 128, "first_k_dense_replace": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_config = load_model_config(tmp_path)
    with open_weights(tmp_path, "dummy", torch.bfloat16, model_config) as weights:
        model = build_deepseek(
            model_config,
            model_config.mla,
            weights,
            lambda _layer: LocalDispatcher(model_config.moe.num_routed_experts),
            "cpu",
            has_kernels=True,
            has_fp8_weights=True,
        )
    dense, sparse = (layer.feed_forward for layer in model._layers)
    attention = [layer.attention for layer in model._layers]

    layers = [dense._up_gate, dense._down, *(part for a in attention for part in (a._down, a._out))]
    assert all(isinstance(layer, Fp8Linear) for layer in layers)
    assert sparse._weights.is_fp8
    assert isinstance(model._head, Linear)
