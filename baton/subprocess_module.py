"""Run `python -m MODULE` of this installation, with the same interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# `python -m` finds our packages from here, installed or not.
CODE_ROOT = Path(__file__).resolve().parent.parent


def module_argv(module: str, arguments: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Its output goes to our terminal. Returns its exit code."""
    return subprocess.run(module_argv(module, arguments), cwd=CODE_ROOT, check=False).returncode
