"""Prompts take a part of a device's time only, where another process decodes on the same device.

Without priorities between processes a device gives each a turn, so a worker that always has prompts takes
half of it. One that rests between its steps takes less. While a step runs the other process has its turns
too, so the part of the device is smaller than the part of the time: at 0.4 about a fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class DeviceShare:
    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """share: of the time, over 0; 1 never rests."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"device_share must be over 0 and at most 1, got {share}")
        self.is_whole = share == 1.0
        self._rest_per_s = 1.0 / share - 1.0
        self._clock = clock
        self._rests_until = 0.0

    def spent(self, seconds: float) -> None:
        """On a step with prompt tokens that ends now."""
        if self._rest_per_s:
            self._rests_until = self._clock() + seconds * self._rest_per_s

    @property
    def rest_s(self) -> float:
        """Until the next step."""
        return max(0.0, self._rests_until - self._clock()) if self._rest_per_s else 0.0
