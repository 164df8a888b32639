"""Finds the model directory; the default model is converted once into the user's cache."""

from __future__ import annotations

from pathlib import Path

from baton.errors import CommandError
from baton.subprocess_module import run_module

DEFAULT_MODEL = "smollm2"
DEFAULT_DIRECTORY = "SmolLM2-135M-Instruct"


def default_model_dir(cache_dir: Path) -> Path:
    return cache_dir / "models" / DEFAULT_DIRECTORY


def resolve_model(model: str, cache_dir: Path) -> Path:
    """The absolute directory of a model, converted now if it is the default one and not there yet."""
    if model == DEFAULT_MODEL:
        return _converted_default(default_model_dir(cache_dir))
    directory = Path(model).expanduser().absolute()
    if not directory.is_dir():
        raise CommandError(f"--model {model}: no such directory (or {DEFAULT_MODEL!r} for the built-in one)")
    if not (directory / "config.json").is_file():
        raise CommandError(f"--model {model}: no config.json in it: not a Hugging Face model directory")
    return directory


def _converted_default(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    print(f"converting the default model once, into {directory}", flush=True)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create {directory.parent}: {error.strerror}") from error
    exit_code = run_module("engine.checkpoint.convert_gguf", ["--smollm2", str(directory)])
    if exit_code != 0:
        raise CommandError(
            "the default model could not be converted (see above); give a directory with --model"
        )
    return directory
