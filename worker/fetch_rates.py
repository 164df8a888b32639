"""How fast blocks come from peers, as measured."""

from __future__ import annotations

from kvstore.worker_record import KvPath, KvRate

_DECAY = 0.8  # of older fetches
_ASSUMED_BYTES_PER_S = 200e6  # before anything was fetched: a slow network
_ASSUMED_LATENCY_S = 0.005


class FetchRates:
    """Written in the event loop, read on the engine thread too."""

    def __init__(self) -> None:
        self._num_bytes = 0.0
        self._transfer_s = 0.0
        self._latency_s: float | None = None

    @property
    def bytes_per_s(self) -> float:
        """0: nothing was fetched yet."""
        return self._num_bytes / self._transfer_s if self._transfer_s else 0.0

    def estimate_s(self, num_bytes: int) -> float:
        latency_s = _ASSUMED_LATENCY_S if self._latency_s is None else self._latency_s
        return latency_s + num_bytes / (self.bytes_per_s or _ASSUMED_BYTES_PER_S)

    def kv_rates(self) -> dict[KvPath, KvRate]:
        """For the registry; empty until something was fetched."""
        if not self.bytes_per_s:
            return {}
        return {"peer": KvRate(bytes_per_s=self.bytes_per_s, latency_s=self._latency_s or 0.0)}

    def observe(self, num_bytes: int, *, latency_s: float, transfer_s: float) -> None:
        """latency_s: from the request to STARTED; transfer_s: from there to the last block written."""
        self._num_bytes = self._num_bytes * _DECAY + num_bytes
        self._transfer_s = self._transfer_s * _DECAY + transfer_s
        older = latency_s if self._latency_s is None else self._latency_s
        self._latency_s = older * _DECAY + latency_s * (1 - _DECAY)
