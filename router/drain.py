"""Whether this router takes new requests, and when the last open one has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from servicekit.errors import Overloaded


class Drain:
    def __init__(self) -> None:
        self.is_draining = False
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Overloaded while draining: another router, or this one's successor, will take it."""
        if self.is_draining:
            raise Overloaded("this router is shutting down")
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._idle.set()

    def begin(self) -> None:
        self.is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """False when requests are still open after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
