"""The connection to Redis (or Valkey), and the one place where its failures become StoreUnavailable.

Redis away is not an outage: callers catch StoreUnavailable and go on with what they know.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TimeoutError,
)

log = logging.getLogger(__name__)

# A blocking read must end before the server is taken for dead.
ANSWER_TIMEOUT_S = 5.0
MAX_BLOCK_S = 2.0

_UNAVAILABLE = (
    ConnectionError,  # refused, cut, still loading, wrong password
    TimeoutError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    OSError,
)


class StoreUnavailable(Exception):
    """Redis cannot be reached or cannot serve now. Never holds the password."""


class Store:
    """One connection pool, shared by everything of a process that talks to Redis."""

    def __init__(self, url: str) -> None:
        """`url`: redis://, rediss:// (TLS) or unix://, with user and password if needed.

        Connects on first use. ValueError when the URL cannot be read.
        """
        self.address = redacted(url)
        self.is_up = False  # the latest exchange was answered; False before the first
        try:
            self._redis = Redis.from_url(
                url,
                # The client's own time limit uses wait_for(), which in Python 3.11 forgets a cancellation
                # that arrives together with the result: exchange() limits the time instead.
                socket_timeout=None,
                socket_connect_timeout=ANSWER_TIMEOUT_S,
                # Once more at once: a pooled connection may have died while idle. Our scripts may run twice.
                retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
            )
        except ValueError as error:
            raise ValueError(f"Redis URL {self.address!r}: {error}") from None
        self._scripts: dict[str, Any] = {}

    @property
    def redis(self) -> Redis:
        """For single commands, inside `async with store.exchange()`."""
        return self._redis

    def pubsub(self) -> PubSub:
        return self._redis.pubsub()

    async def ping(self) -> None:
        async with self.exchange():
            await cast(Any, self._redis.ping())

    async def run_script(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Run kvstore/<name>.lua atomically."""
        script = self._scripts.get(name)
        if script is None:
            source = files("kvstore").joinpath(f"{name}.lua").read_text()
            script = self._scripts[name] = self._redis.register_script(source)
        async with self.exchange():
            return await script(keys=keys, args=args)

    async def close(self) -> None:
        await self._redis.aclose()

    @asynccontextmanager
    async def exchange(self) -> AsyncIterator[None]:
        """Around every call of the client: StoreUnavailable when it fails or has no answer in time."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                yield
            self.is_up = True
        except _UNAVAILABLE as error:
            self.is_up = False
            raise StoreUnavailable(f"Redis at {self.address}: {type(error).__name__}: {error}") from error


class Backoff:
    """Waiting times between attempts: doubling, jittered, capped."""

    def __init__(self, first_s: float = 0.05, max_s: float = 2.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def next_s(self) -> float:
        wait_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._max_s, self._next_s * 2)
        return wait_s

    def reset(self) -> None:
        self._next_s = self._first_s


class Outage:
    """The failures in a row of one retrying loop: logged once when they begin and once when they end."""

    def __init__(self, user: str) -> None:
        self._user = user  # begins the event's name
        self._backoff = Backoff()
        self._began_at: float | None = None

    def go_on(self, error: StoreUnavailable) -> float:
        """Seconds to wait before the next attempt."""
        if self._began_at is None:
            self._began_at = time.monotonic()
            log.warning(f"{self._user}_lost_redis", extra={"fields": {"reason": str(error)}})
        return self._backoff.next_s()

    def end(self) -> None:
        """Idempotent."""
        if self._began_at is not None:
            elapsed_s = time.monotonic() - self._began_at
            log.info(f"{self._user}_found_redis", extra={"fields": {"elapsed_s": elapsed_s}})
            self._began_at = None
            self._backoff.reset()


def redacted(url: str) -> str:
    """Scheme and place of a Redis URL, for people and logs: no user, no password, no query."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"
