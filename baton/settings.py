"""What the command line takes from the environment; services read their own BATON_* variables themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSettings:
    redis_url: str | None  # REDIS_URL; None: an embedded server is started
    cache_dir: Path  # converted models
    state_dir: Path  # logs of runs
    environment: dict[str, str]  # what a child process inherits
    api_key: str | None = field(default=None, repr=False)  # BATON_API_KEY or OPENAI_API_KEY


def load_command_settings() -> CommandSettings:
    home = Path(os.environ.get("HOME") or Path.home())
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    state_root = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return CommandSettings(
        api_key=os.environ.get("BATON_API_KEY") or os.environ.get("OPENAI_API_KEY") or None,
        redis_url=os.environ.get("REDIS_URL") or None,
        cache_dir=cache_root / "baton",
        state_dir=state_root / "baton",
        # Kernels are compiled once for all runs.
        environment={"TRITON_CACHE_DIR": str(cache_root / "baton" / "triton"), **os.environ},
    )
