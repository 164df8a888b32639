"""`baton prepare-model`: makes sure that a model directory is there, for deployments that mount one."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from baton.errors import CommandError
from baton.subprocess_module import run_module
from baton.up.model_store import DEFAULT_MODEL, SMOLLM2_DIRECTORY, required_shipped_model_dir

TINY_EXPERTS = "tiny-experts"
_NAMES = f"{DEFAULT_MODEL}, {SMOLLM2_DIRECTORY}, {TINY_EXPERTS} (random weights)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help=f"{_NAMES}, or a directory that is there")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="the directory of all models")


def run(args: argparse.Namespace) -> int:
    directory: Path = (args.into / args.name).absolute()
    if (directory / "config.json").is_file():
        print(f"{directory} is there")
        return 0
    if args.name == DEFAULT_MODEL:
        _copy(required_shipped_model_dir(), directory)
        return 0
    if args.name == SMOLLM2_DIRECTORY:
        return run_module("engine.checkpoint.convert_gguf", ["--smollm2", str(directory)])
    if args.name == TINY_EXPERTS:
        return run_module("engine.checkpoint.random_checkpoint", [str(directory), "--arch", "deepseek_v3"])
    raise CommandError(
        f"{directory} has no config.json: put a Hugging Face model directory there, or ask for {_NAMES}"
    )


def _copy(source: Path, target: Path) -> None:
    """All of it or nothing: `target` gets its name when it is whole."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, partial, copy_function=shutil.copyfile)
        partial.rename(target)
    except (OSError, shutil.Error) as error:
        raise CommandError(f"cannot copy {source} to {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
