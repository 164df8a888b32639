"""The trained student as a Hugging Face directory: bfloat16 safetensors under DeepSeek-V3's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from engine.checkpoint.safetensors_writer import TensorToWrite, write_tensors
from engine.checkpoint.tokenizer_files import TokenizerSpec, write_tokenizer
from tools.demo_model.student import Experts, Student

MAX_SHARD_BYTES = 15 << 20
# What a small model needs to stay on its subject, and not to say it over and over.
_SAMPLING = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}


def export(student: Student, tokenizer: TokenizerSpec, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(student.config.hub(), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2} | _SAMPLING
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(directory, tokenizer)
    tensors = [
        TensorToWrite(name, tensor.numel() * tensor.element_size(), partial(_stored, tensor))
        for name, tensor in hub_tensors(student)
    ]
    write_tensors(directory, tensors, max_shard_bytes=MAX_SHARD_BYTES)


def hub_tensors(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    """bfloat16, but float32 for the bias that decides between experts, as on the hub."""
    last = len(student.layers)
    for name, parameter in student.named_parameters():
        if ".mlp." in name and name.endswith(("_ED", "_EFD", "_EDF")):
            continue
        if name.startswith("mtp."):
            rest = name.removeprefix("mtp.").replace("head_norm.", "shared_head.norm.")
            yield f"model.layers.{last}.{rest}", parameter.detach().bfloat16()
        else:
            yield f"model.{name}", parameter.detach().bfloat16()
    for index, layer in enumerate([*student.layers, student.mtp]):
        if isinstance(layer.mlp, Experts):
            yield from _expert_tensors(f"model.layers.{index}.mlp", layer.mlp)


def _expert_tensors(prefix: str, experts: Experts) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{prefix}.gate.weight", experts.gate_weight_ED.detach().bfloat16()
    yield f"{prefix}.gate.e_score_correction_bias", experts.bias_E.float()
    stacks = {
        "gate_proj": experts.gate_proj_EFD,
        "up_proj": experts.up_proj_EFD,
        "down_proj": experts.down_proj_EDF,
    }
    for index in range(len(experts.bias_E)):
        for name, stack in stacks.items():
            yield f"{prefix}.experts.{index}.{name}.weight", stack[index].detach().bfloat16()


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().cpu().clone()
