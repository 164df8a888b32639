"""How much a key may still use this minute: one script in Redis, so that several routers count as one.

Redis away: this process counts alone, with what it has seen since. That is the best it can know.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from kvstore import keys
from kvstore.api_keys import ApiKey
from kvstore.quota_window import QuotaWindow, Reservation
from kvstore.store import Store, StoreUnavailable

_RETRY_S = 5.0  # Redis is left alone for so long after a failure: a request must not wait for a time-out


class Quotas(Protocol):
    async def reserve(self, key: ApiKey, num_tokens: int) -> Reservation:
        """Takes one request and `num_tokens` when both fit, else nothing."""
        ...

    async def settle(
        self, key: ApiKey, reservation: Reservation, *, more_requests: int, more_tokens: int
    ) -> None:
        """Corrects a granted reservation by what was really used."""
        ...


class LocalQuotas:
    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._windows: dict[str, QuotaWindow] = {}  # by digest of the key

    async def reserve(self, key: ApiKey, num_tokens: int) -> Reservation:
        now = int(self._clock())
        for digest in [digest for digest, window in self._windows.items() if window.is_empty(now)]:
            del self._windows[digest]
        window = self._windows.setdefault(key.digest, QuotaWindow())
        return window.reserve(now, num_tokens, key.requests_per_minute, key.tokens_per_minute)

    async def settle(
        self, key: ApiKey, reservation: Reservation, *, more_requests: int, more_tokens: int
    ) -> None:
        window = self._windows.get(key.digest)
        if window is not None:
            window.settle(int(self._clock()), reservation.second, more_requests, more_tokens)


class RedisQuotas:
    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._local = LocalQuotas()
        self._retry_at = 0.0

    async def reserve(self, key: ApiKey, num_tokens: int) -> Reservation:
        limits = [key.requests_per_minute or 0, key.tokens_per_minute or 0]
        if self._clock() >= self._retry_at:
            try:
                answer = await self._store.run_script(
                    "quota_reserve", [keys.quota(key.digest)], [*limits, num_tokens]
                )
            except StoreUnavailable:
                self._retry_at = self._clock() + _RETRY_S
            else:
                return _reservation(answer)
        return await self._local.reserve(key, num_tokens)

    async def settle(
        self, key: ApiKey, reservation: Reservation, *, more_requests: int, more_tokens: int
    ) -> None:
        if reservation.is_local:
            await self._local.settle(key, reservation, more_requests=more_requests, more_tokens=more_tokens)
            return
        if self._clock() < self._retry_at:
            return
        try:
            await self._store.run_script(
                "quota_settle", [keys.quota(key.digest)], [reservation.second, more_requests, more_tokens]
            )
        except StoreUnavailable:
            self._retry_at = self._clock() + _RETRY_S


def _reservation(answer: list[int]) -> Reservation:
    granted, requests_left, tokens_left, requests_reset_s, tokens_reset_s, retry_after_s, second = answer
    return Reservation(
        is_granted=bool(granted),
        requests_left=requests_left,
        tokens_left=tokens_left,
        requests_reset_s=requests_reset_s,
        tokens_reset_s=tokens_reset_s,
        retry_after_s=retry_after_s,
        second=second,
    )
