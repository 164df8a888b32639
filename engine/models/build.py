from __future__ import annotations

from collections.abc import Callable

import torch

from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import WeightSource
from engine.models.causal_lm import CausalLM
from engine.models.deepseek import build_deepseek
from engine.models.llama import build_llama
from engine.moe.dispatch import Dispatcher, LocalDispatcher


def build_model(
    config: ModelConfig,
    weights: WeightSource,
    dispatcher_for: Callable[[int], Dispatcher] | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> CausalLM:
    """dispatcher_for(layer) gives the dispatcher of each MoE layer; None keeps all experts on this rank."""
    if config.model_type == "llama":
        return build_llama(config, weights, dtype, device)
    if config.model_type not in ("deepseek_v2", "deepseek_v3"):
        raise ValueError(f"unsupported model_type {config.model_type!r}")
    if dispatcher_for is None:
        num_experts = config.moe.num_routed_experts if config.moe else 0
        return build_deepseek(config, weights, lambda _: LocalDispatcher(num_experts), dtype, device)
    return build_deepseek(config, weights, dispatcher_for, dtype, device)
