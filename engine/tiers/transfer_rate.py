"""How fast blocks come from one tier, as measured."""

from __future__ import annotations

_DECAY = 0.8  # of older loads


class TransferRate:
    """Written and read on the engine thread."""

    def __init__(self, assumed_bytes_per_s: float, latency_s: float) -> None:
        """assumed_bytes_per_s: before anything was loaded. latency_s: before the first byte."""
        self._assumed_bytes_per_s = assumed_bytes_per_s
        self.latency_s = latency_s
        self._num_bytes = 0.0
        self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0: nothing was loaded yet."""
        return self._num_bytes / self._seconds if self._seconds else 0.0

    def estimate_s(self, num_bytes: int) -> float:
        if not num_bytes:
            return 0.0
        return self.latency_s + num_bytes / (self.bytes_per_s or self._assumed_bytes_per_s)

    def observe(self, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            self._num_bytes = self._num_bytes * _DECAY + num_bytes
            self._seconds = self._seconds * _DECAY + max(seconds, 1e-6)
