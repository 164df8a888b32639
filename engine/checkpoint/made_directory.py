"""A directory that is either absent or whole, made by one process at a time.

1. A lock file beside it is taken; whoever waits for it finds the work done.
2. The content is made in `.NAME.partial`; what a killed process left there is removed first.
3. `origin.json` is written into it: what it was made from. The same origin later means nothing to do.
4. One rename puts it in place.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint.errors import CheckpointError

_ORIGIN_NAME = "origin.json"


def make_directory(target: Path, origin: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """False when `target` was made from `origin` before. Raises CheckpointError if others made it."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _origin(target) == origin:
            return False
        if target.exists() and any(target.iterdir()) and _origin(target) is None:
            raise CheckpointError(
                f"{target}: exists and was not made by this command; choose another directory"
            )
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            fill(partial)
            (partial / _ORIGIN_NAME).write_text(json.dumps(origin, indent=2) + "\n")
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True


def _origin(directory: Path) -> Any:
    """None when the directory is absent or was not made here."""
    try:
        return json.loads((directory / _ORIGIN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
