"""The sliding minute of one key in this process alone: the same arithmetic as quota_reserve.lua.

Seconds are whole ones of the caller's clock; a second leaves the window 60 s after it began.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

WINDOW_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    is_granted: bool
    requests_left: int  # of the limit, after this one; 0 without a limit
    tokens_left: int
    requests_reset_s: int  # until the window is empty of requests
    tokens_reset_s: int
    retry_after_s: int  # 0 when granted
    second: int  # of the clock that counted it
    is_local: bool = False  # counted by this process alone


@dataclass(slots=True)
class QuotaWindow:
    _requests: Counter[int] = field(default_factory=Counter)  # second -> how many
    _tokens: Counter[int] = field(default_factory=Counter)

    def reserve(
        self, now: int, num_tokens: int, max_requests: int | None, max_tokens: int | None
    ) -> Reservation:
        self._forget(now)
        wait_s = max(
            _wait_s(self._requests, 1, max_requests, now), _wait_s(self._tokens, num_tokens, max_tokens, now)
        )
        if wait_s == 0:
            self._requests[now] += 1
            self._tokens[now] += num_tokens
        return Reservation(
            is_granted=wait_s == 0,
            requests_left=max(0, (max_requests or 0) - self._requests.total()),
            tokens_left=max(0, (max_tokens or 0) - self._tokens.total()),
            requests_reset_s=_reset_s(self._requests, now),
            tokens_reset_s=_reset_s(self._tokens, now),
            retry_after_s=wait_s,
            second=now,
            is_local=True,
        )

    def settle(self, now: int, taken_at: int, more_requests: int, more_tokens: int) -> None:
        """As quota_settle.lua does."""
        for counter, change in ((self._requests, more_requests), (self._tokens, more_tokens)):
            if change > 0:
                counter[now] += change
            elif change < 0 and taken_at in counter:
                counter[taken_at] += change

    def is_empty(self, now: int) -> bool:
        self._forget(now)
        return not self._requests and not self._tokens

    def _forget(self, now: int) -> None:
        for counter in (self._requests, self._tokens):
            for second in [second for second in counter if second <= now - WINDOW_S]:
                del counter[second]


def _wait_s(counter: Counter[int], wanted: int, limit: int | None, now: int) -> int:
    """Seconds until so much has left the window that `wanted` fits."""
    excess = counter.total() + wanted - (limit or 0)
    if limit is None or excess <= 0:
        return 0
    for second in sorted(counter):
        excess -= counter[second]
        if excess <= 0:
            return second + WINDOW_S - now
    return WINDOW_S


def _reset_s(counter: Counter[int], now: int) -> int:
    return max(counter) + WINDOW_S - now if counter.total() > 0 else 0
