"""A random checkpoint with a layer of multi-token prediction whose drafts are mostly right."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.random_checkpoint import make_random_checkpoint


def make_agreeing_checkpoint(model_dir: Path, context_gain: float) -> None:
    """Without what attention and feed-forward add, a token's logits are
    those of its own embedding: in the main model and, with a projection that hands the embedding on, in the
    layer of multi-token prediction too. context_gain of what they add stays, and makes both differ."""
    make_random_checkpoint(model_dir, "deepseek_v3", "tiny_mtp")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(context_gain)
        elif name.endswith("eh_proj.weight"):
            tensor.copy_(torch.eye(tensor.shape[0], tensor.shape[1]))
    save_file(tensors, file)
