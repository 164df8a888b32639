"""How long sequences take on the decode workers, from those that ended: the drain rate of a full batch."""

from __future__ import annotations

_WEIGHT = 0.05  # of the newest sequence; the first ones count as a plain mean


class ServiceTimes:
    """Exponential means over finished sequences. All 0 before the first one."""

    def __init__(self) -> None:
        self.residence_s = 0.0  # in the batch, the computing of the prompt included where that is done there
        self.tpot_s = 0.0
        self.num_tokens = 0.0  # of an answer
        self._num_seen = 0

    def ended(self, residence_s: float, decode_s: float, num_tokens: int) -> None:
        """`decode_s`: first to last token."""
        self._num_seen += 1
        weight = max(_WEIGHT, 1 / self._num_seen)
        self.residence_s += weight * (residence_s - self.residence_s)
        self.num_tokens += weight * (num_tokens - self.num_tokens)
        if num_tokens >= 2:
            tpot_s = decode_s / (num_tokens - 1)
            self.tpot_s = self.tpot_s + weight * (tpot_s - self.tpot_s) if self.tpot_s else tpot_s
