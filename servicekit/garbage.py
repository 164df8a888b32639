"""Python's search for reference cycles, without its long pauses.

A full search visits every object of the process, and stops all requests meanwhile: 60 ms for a router that
has just started (docs/log.md). Almost all of them live as long as the process and are in no garbage.
"""

from __future__ import annotations

import gc

# Objects made and not freed before the young are searched; searches of the young for one of the middle-aged;
# searches of these for a full one. Python's are 700, 10, 10: for programs that make most of their objects in
# cycles. What a request makes is freed by reference counts.
_THRESHOLDS = (10_000, 20, 50)


def exempt_from_garbage_search() -> None:
    """All objects that exist now. Call it once, when the service is built."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
