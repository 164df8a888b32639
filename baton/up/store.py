"""The Redis of a run: the one of REDIS_URL, or an embedded server that lives as long as the run."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from baton.errors import CommandError
from kvstore.embedded import EmbeddedServer, EmbeddedServerFailed
from kvstore.registry import RedisRegistry, Registry
from kvstore.store import Store, StoreUnavailable

_RESTART_DELAY_S = 0.2


@dataclass(slots=True)
class RunStore:
    url: str
    registry: Registry
    server: EmbeddedServer | None  # None: somebody else's

    @property
    def pid(self) -> int | None:
        return self.server.pid if self.server else None

    async def keep_running(self, on_restart: Callable[[], None]) -> None:
        """Until cancelled: an embedded server that dies is started again, empty, at the same URL.

        Workers and routers register again by themselves. Raises CommandError when it does not start.
        """
        while True:
            if self.server is None or self.server.pid is None:
                await asyncio.Event().wait()
                continue
            await _ended(self.server.pid)
            await asyncio.sleep(_RESTART_DELAY_S)
            _start(self.server)
            on_restart()


@contextlib.asynccontextmanager
async def open_store(redis_url: str | None, model: str) -> AsyncIterator[RunStore]:
    """Raises CommandError when it does not answer."""
    with _server(redis_url) as (url, server):
        store = _store(url)
        try:
            await _ping(store)
            yield RunStore(url, RedisRegistry(store, model), server)
        finally:
            await store.close()


def probe_redis(url: str) -> str | None:
    """Why it cannot be used; None when it answers."""

    async def ping() -> None:
        store = _store(url)
        try:
            await _ping(store)
        finally:
            await store.close()

    try:
        asyncio.run(ping())
    except CommandError as error:
        return str(error)
    return None


def probe_embedded_server() -> str | None:
    """The same for the embedded server, by starting one."""
    try:
        with _server(None) as (url, _):
            return probe_redis(url)
    except CommandError as error:
        return str(error)


@contextlib.contextmanager
def _server(redis_url: str | None) -> Iterator[tuple[str, EmbeddedServer | None]]:
    if redis_url:
        yield redis_url, None
        return
    server = EmbeddedServer()
    try:
        yield _start(server), server
    finally:
        server.stop()


def _start(server: EmbeddedServer) -> str:
    try:
        return server.start()
    except EmbeddedServerFailed as error:
        raise CommandError(str(error), exit_code=1) from error


async def _ended(pid: int) -> None:
    """Return when the process has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _ping(store: Store) -> None:
    try:
        await store.ping()
    except StoreUnavailable as error:
        raise CommandError(f"{error}; start it, or unset REDIS_URL for the embedded server") from error


def _store(url: str) -> Store:
    try:
        return Store(url)
    except ValueError as error:
        raise CommandError(f"REDIS_URL: {error}") from error
