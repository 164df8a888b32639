"""How long the parts of a start took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimes:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # by phase, in order

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block, also when it raises. The host's time: who needs the device's waits for it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
