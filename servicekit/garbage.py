"""Python's search for reference cycles, without its long pauses.

A full search visits every object of the process, and stops all requests meanwhile: 60 ms for a router that
has just started (docs/log.md). Almost all of them live as long as the process and are in no garbage.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from servicekit.logging import get_logger

# Objects made and not freed before the young are searched; searches of the young for one of the middle-aged;
# searches of these for a full one. Python's are 700, 10, 10: for programs that make most of their objects in
# cycles. What a request makes is freed by reference counts. With 10,000 a search of the young took a router
# under load up to 25 ms; all of them together take the same.
_THRESHOLDS = (2_000, 100, 50)
_LOGGED_S = 0.001

log = get_logger(__name__)


def exempt_from_garbage_search() -> None:
    """All objects that exist now. Call it once, when the service is built."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    if log.shows_debug and not any(isinstance(each, _LoggedSearches) for each in gc.callbacks):
        gc.callbacks.append(_LoggedSearches())


class _LoggedSearches:
    """Each one that took a while, at level DEBUG: no thread of the process ran meanwhile."""

    def __init__(self) -> None:
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        now = time.monotonic()
        if phase == "start":
            self._began = now
        elif now - self._began > _LOGGED_S:
            log.debug(
                "garbage_search", generation=info["generation"], elapsed_s=now - self._began, ended_at=now
            )
