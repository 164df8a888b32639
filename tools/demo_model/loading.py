"""The student back from its checkpoint."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from tools.demo_model.student import Experts, Student, StudentConfig


def load_student(directory: Path) -> Student:
    """In float32 and ready to be asked, from what export() wrote."""
    hub = json.loads((directory / "config.json").read_text())
    config = StudentConfig(**{field.name: hub[field.name] for field in fields(StudentConfig)})
    stored = {
        name: tensor.float()
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    student = Student(config)
    state = {name: value for name, value in student.state_dict().items() if name.endswith("load_E")}
    for name, _ in student.named_parameters():
        hub_name = _hub_name(name, config.num_hidden_layers)
        if hub_name in stored:
            state[name] = stored[hub_name]
    for index, layer in enumerate([*student.layers, student.mtp]):
        if isinstance(layer.mlp, Experts):
            place = "mtp" if layer is student.mtp else f"layers.{index}"
            state |= _experts(f"{place}.mlp.", f"model.layers.{index}.mlp.", stored, config.n_routed_experts)
    student.load_state_dict(state)
    return student.eval()


def _hub_name(name: str, num_layers: int) -> str:
    if not name.startswith("mtp."):
        return f"model.{name}"
    return f"model.layers.{num_layers}." + name.removeprefix("mtp.").replace(
        "head_norm.", "shared_head.norm."
    )


def _experts(
    ours: str, theirs: str, stored: dict[str, torch.Tensor], num_experts: int
) -> dict[str, torch.Tensor]:
    def stack(projection: str) -> torch.Tensor:
        return torch.stack([stored[f"{theirs}experts.{i}.{projection}.weight"] for i in range(num_experts)])

    return {
        f"{ours}gate_weight_ED": stored[f"{theirs}gate.weight"],
        f"{ours}bias_E": stored[f"{theirs}gate.e_score_correction_bias"],
        f"{ours}gate_proj_EFD": stack("gate_proj"),
        f"{ours}up_proj_EFD": stack("up_proj"),
        f"{ours}down_proj_EDF": stack("down_proj"),
    }
