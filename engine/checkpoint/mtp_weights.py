"""Whether a checkpoint really has the layer of multi-token prediction that its config.json promises."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.safetensors_file import checkpoint_files, read_header


def has_mtp_layer(model_dir: Path, load_format: str, config: ModelConfig) -> bool:
    """Conversions leave the layer out and its number in. Raises CheckpointError."""
    if config.model_type != "deepseek_v3" or not config.num_mtp_layers:
        return False
    if load_format == "dummy":
        return True
    wanted = f"model.layers.{config.num_layers}.eh_proj.weight"
    return any(
        wanted in (read_header(path).tensors if names is None else names)
        for path, names in checkpoint_files(Path(model_dir)).items()
    )
