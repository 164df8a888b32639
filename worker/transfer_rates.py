"""What hand-offs to this worker cost beyond the compute that hides them, as measured."""

from __future__ import annotations

from typing import cast

from kvstore.worker_record import KvPath, KvRate
from worker.linear_fit import LinearFit

_DECAY = 0.95  # of older hand-offs
_MAX_BYTES_PER_S = 1e12  # when bytes seem to cost nothing
_PATHS = {"device_memory": "shared_memory"}  # both are the way inside a host, and a router knows one


class TransferRates:
    def __init__(self) -> None:
        self._fits: dict[str, LinearFit] = {}  # by path

    def observe(self, carrier: str, num_bytes: int, elapsed_s: float) -> None:
        """`num_bytes`: those that were still to come when the first token was sampled; elapsed_s: from then
        until the last of them was there."""
        fit = self._fits.setdefault(_PATHS.get(carrier, carrier), LinearFit(2, decay=_DECAY))
        fit.observe((1.0, float(num_bytes)), elapsed_s)

    def kv_rates(self) -> dict[KvPath, KvRate]:
        """For the registry: the paths that were used."""
        rates: dict[KvPath, KvRate] = {}
        for path, fit in self._fits.items():
            latency_s, byte_s = fit.solve()
            # None: compute has hidden every byte so far.
            bytes_per_s = 0.0 if byte_s is None else 1 / max(byte_s, 1 / _MAX_BYTES_PER_S)
            rates[cast(KvPath, path)] = KvRate(bytes_per_s=bytes_per_s, latency_s=latency_s or 0.0)
        return rates
