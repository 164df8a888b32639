"""Time left on the wire, a deadline inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from servicekit.errors import Overloaded


class Deadline:
    """Of one request, on this process's clock."""

    def __init__(self, time_left_s: float) -> None:
        """0: no deadline."""
        self._at = asyncio.get_running_loop().time() + time_left_s if time_left_s > 0 else None

    @property
    def time_left_s(self) -> float:
        """As on the wire: 0 is no deadline, so a deadline that has passed is still a little above."""
        if self._at is None:
            return 0.0
        return max(1e-3, self._at - asyncio.get_running_loop().time())

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Raises Overloaded when it passes inside."""
        scope = asyncio.timeout_at(self._at)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise Overloaded("the request's deadline passed") from error
