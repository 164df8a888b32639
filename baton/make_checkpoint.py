"""Forwards to the engine's checkpoint maker as a process, because the command line does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.subprocess_module import run_module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write it")
    parser.add_argument("--arch", required=True, choices=("deepseek_v3", "deepseek_v2", "llama"))
    parser.add_argument("--preset", choices=("tiny", "small576", "tiny_mtp"), default="tiny")
    parser.add_argument(
        "--fp8", action="store_true", help="store linear weights as FP8 with 128x128 block scales"
    )


def run(args: argparse.Namespace) -> int:
    arguments = [str(args.directory.absolute()), "--arch", args.arch, "--preset", args.preset]
    if args.fp8:
        arguments.append("--fp8")
    return run_module("engine.checkpoint.random_checkpoint", arguments)
