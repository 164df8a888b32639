"""Ends the work of a request when its client goes away, whatever that work is waiting for."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from router.http_errors import ClientGone


class DisconnectGuard:
    """`async with DisconnectGuard(receive)`: when the client leaves the body is cancelled, ClientGone raised.

    Works as asyncio.timeout does. The request body must have been read, and nobody else may call `receive`.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancels = task.cancelling()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        del self._watcher  # its CancelledError leads back here: a cycle, for each request
        if self._is_gone and self._task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
            raise ClientGone from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._task.cancel()
