"""How many requests a worker holds at once, and the end of taking new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from servicekit.errors import Overloaded, WorkerLost


class Admission:
    def __init__(self, max_requests: int) -> None:
        self.retry_after_s: Callable[[], float] = lambda: 1.0  # what a refusal says
        self.num_requests = 0
        self.is_draining = False
        self._max_requests = max_requests
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """One request from here to the end of the block. Raises Overloaded or, when draining, WorkerLost."""
        if self.is_draining:
            raise WorkerLost("this worker is draining: submit elsewhere")
        if self.num_requests >= self._max_requests:
            raise Overloaded(
                f"this worker already holds {self.num_requests} requests, its limit",
                retry_after_s=self.retry_after_s(),
            )
        self.num_requests += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.num_requests -= 1
            if self.num_requests == 0:
                self._is_empty.set()

    async def until_empty(self) -> None:
        await self._is_empty.wait()

    async def drain(self, grace_s: float) -> bool:
        """Take nothing new and wait for what runs. False when grace_s was not enough."""
        self.is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self.until_empty()
        except TimeoutError:
            return False
        return True
