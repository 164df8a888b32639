"""`baton prepare-model`: makes sure that a model directory is there, for deployments that mount one."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.errors import CommandError
from baton.subprocess_module import run_module
from baton.up.model_store import DEFAULT_DIRECTORY

TINY_EXPERTS = "tiny-experts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", help=f"{DEFAULT_DIRECTORY}, {TINY_EXPERTS} (random weights), or a directory that is there"
    )
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="the directory of all models")


def run(args: argparse.Namespace) -> int:
    directory: Path = (args.into / args.name).absolute()
    if (directory / "config.json").is_file():
        print(f"{directory} is there")
        return 0
    if args.name == DEFAULT_DIRECTORY:
        return run_module("engine.checkpoint.convert_gguf", ["--smollm2", str(directory)])
    if args.name == TINY_EXPERTS:
        return run_module("engine.checkpoint.random_checkpoint", [str(directory), "--arch", "deepseek_v3"])
    raise CommandError(
        f"{directory} has no config.json: put a Hugging Face model directory there, or ask for"
        f" {DEFAULT_DIRECTORY} or {TINY_EXPERTS}"
    )
