"""A router's copy of all API keys: no round trip on a request, revocation within a second.

Redis away: keys that are known go on for a bounded time. A key that is not known then cannot be told from one
that was created meanwhile, so nobody is told that it is wrong, and nobody gets in with it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import NoReturn

from kvstore.api_keys import ApiKey, ApiKeyListing, digest_of
from kvstore.store import Outage, StoreUnavailable

REFRESH_S = 1.0
_PAUSE_S = 0.2  # between looks: however many unknown keys are tried, they wait for the same one


class ApiKeyMirror:
    def __init__(
        self, listing: ApiKeyListing, *, grace_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`grace_s`: how long known keys outlive the connection to Redis."""
        self._listing = listing
        self._grace_s = grace_s
        self._clock = clock
        self._by_digest: dict[str, ApiKey] = {}
        self._version: str | None = None
        self._synced_at: float | None = None
        self._refreshing = asyncio.Lock()

    @property
    def num_keys(self) -> int:
        return len(self._by_digest)

    async def run(self) -> NoReturn:
        """Until cancelled."""
        outage = Outage("api_keys")
        while True:
            try:
                await self._refresh()
                outage.end()
                await asyncio.sleep(REFRESH_S)
            except StoreUnavailable as error:
                await asyncio.sleep(outage.go_on(error))

    async def find(self, secret: str) -> ApiKey | None:
        """None: nobody's key. Raises StoreUnavailable when that cannot be known.

        An expired key is returned: what to say about it is the caller's.
        """
        digest = digest_of(secret)
        key = self._lookup(digest)
        if key is not None:
            if self._age_s() > self._grace_s:
                raise StoreUnavailable("API keys could not be checked for too long")
            return key
        await self._refresh()  # it may be a new one
        return self._lookup(digest)

    def _lookup(self, digest: str) -> ApiKey | None:
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def _age_s(self) -> float:
        return float("inf") if self._synced_at is None else self._clock() - self._synced_at

    async def _refresh(self) -> None:
        """What Redis holds at some moment after this call."""
        called_at = self._clock()
        async with self._refreshing:
            if self._synced_at is not None and self._synced_at >= called_at:
                return  # somebody looked while we waited
            await asyncio.sleep(max(0.0, _PAUSE_S - self._age_s()))
            asked_at = self._clock()
            version = await self._listing.version()
            if version != self._version:
                # A change between the two reads shows again as a new version at the next look.
                self._by_digest = {key.digest: key for key in await self._listing.list()}
                self._version = version
            self._synced_at = asked_at
