"""How much of a worker its peers may use at once: fetches must never starve its own prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from servicekit.errors import Overloaded

MAX_FETCHES = 4
_RETRY_AFTER_S = 0.5


class FetchLimit:
    def __init__(self, num_blocks: int, max_fetches: int = MAX_FETCHES) -> None:
        """num_blocks: of the worker's cache. A quarter of it may be pinned for peers."""
        self.num_fetches = 0
        self.num_pinned_blocks = 0
        self._max_fetches = max_fetches
        self._max_pinned_blocks = max(1, num_blocks // 4)

    @contextmanager
    def admit(self, num_blocks: int) -> Iterator[int]:
        """How many of num_blocks, 1 or more, the fetch may pin inside the block. Raises Overloaded."""
        granted = min(num_blocks, self._max_pinned_blocks - self.num_pinned_blocks)
        if self.num_fetches >= self._max_fetches or granted < 1:
            raise Overloaded(
                f"this worker serves {self.num_fetches} fetches of {self.num_pinned_blocks} blocks already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.num_fetches += 1
        self.num_pinned_blocks += granted
        try:
            yield granted
        finally:
            self.num_fetches -= 1
            self.num_pinned_blocks -= granted
