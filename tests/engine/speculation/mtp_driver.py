"""Checkpoints with a layer of multi-token prediction, and engines over them, for the tests beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.build import build_engine
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine, EngineLimits
from engine.engine_config import EngineConfig
from engine.scheduler import SchedulerConfig

VOCAB_SIZE = 4096
NUM_LAYERS = 4


def make_agreeing_checkpoint(model_dir: Path, context_gain: float) -> None:
    """One whose drafts are mostly right. Without what attention and feed-forward add, a token's logits are those
    of its own embedding, in the main model and, with a projection that hands the embedding on, in the layer of
    multi-token prediction: both say the same. context_gain of what they add stays, and makes them differ."""
    make_random_checkpoint(model_dir, "deepseek_v3", "tiny_mtp")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(context_gain)
        elif name.endswith("eh_proj.weight"):
            tensor.copy_(torch.eye(tensor.shape[0], tensor.shape[1]))
    save_file(tensors, file)


def build(
    model_dir: Path, num_speculative_tokens: int, *, growth_tokens: int | None = None, **changes: Any
) -> Engine:
    settings = {"dtype": "float32", "num_blocks": 80, "max_running": 8, "token_budget": 512} | changes
    engine = build_engine(
        EngineConfig(model_dir=model_dir, num_speculative_tokens=num_speculative_tokens, **settings)
    )
    if growth_tokens is None:
        return engine
    config = SchedulerConfig(
        token_budget=settings["token_budget"],
        max_running=settings["max_running"],
        growth_tokens=growth_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )
    limits = EngineLimits(
        max_model_len=engine.max_model_len, vocab_size=engine.vocab_size, eos_token_ids=engine.eos_token_ids
    )
    return Engine(engine._runner, engine.kv_cache, limits, config)


def random_prompts(lengths: tuple[int, ...], seed: int = 5) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
