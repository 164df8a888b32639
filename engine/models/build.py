from __future__ import annotations

from collections.abc import Callable

import torch

from engine.checkpoint.dummy_weights import DummyWeights
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.kernels.support import has_kernels
from engine.models.causal_lm import CausalLM
from engine.models.deepseek import build_deepseek
from engine.models.llama import build_llama
from engine.moe.dispatch import Dispatcher, LocalDispatcher


def build_model(  # noqa: PLR0913 - three of them are rare and keyword-only
    config: ModelConfig,
    weights: WeightSource,
    dispatcher_for: Callable[[int], Dispatcher] | None,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    uses_kernels: bool | None = None,
    has_fp8_weights: bool = False,
    has_mtp: bool = False,
) -> CausalLM:
    """dispatcher_for(layer) gives the dispatcher of each MoE layer; None keeps all experts on this rank.
    uses_kernels None: where the device has them. FP8 weights need them. has_mtp: with the layer of
    multi-token prediction."""
    placed = PlacedWeights(weights, dtype, device)
    if uses_kernels is None:
        uses_kernels = has_kernels(device)
    model: CausalLM
    if config.mla is None:
        model = build_llama(config, placed, device)
    else:
        local = LocalDispatcher(config.moe.num_routed_experts if config.moe else 0)
        model = build_deepseek(
            config,
            config.mla,
            placed,
            dispatcher_for or (lambda _: local),
            device,
            uses_kernels,
            has_fp8_weights=has_fp8_weights,
            has_mtp=has_mtp,
        )
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what loading left over counts as taken when the KV cache is sized
    return model


class PlacedWeights:
    """A weight source whose tensors are on the model's device, in its dtype."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device | str) -> None:
        if isinstance(source, DummyWeights):
            source.move_to(device)
        self._source = source
        self._dtype = dtype
        self._device = device

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._source.get(name, shape, dtype or self._dtype).to(self._device)

    def has(self, name: str) -> bool:
        return self._source.has(name)
