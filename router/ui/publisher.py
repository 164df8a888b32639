"""One snapshot a second for all viewers; nothing runs while there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from router.ui.snapshot import Snapshots
from servicekit.logging import get_logger

log = get_logger(__name__)

_PERIOD_S = 1.0
MAX_VIEWERS = 64


class Publisher:
    """A viewer who is slow gets the latest snapshot and misses those between."""

    def __init__(
        self, snapshots: Snapshots, is_over: Callable[[], bool], period_s: float = _PERIOD_S
    ) -> None:
        """`is_over`: the router is about to exit; viewers are sent home."""
        self._snapshots = snapshots
        self._is_over = is_over
        self._period_s = period_s
        self._num_viewers = 0
        self._latest = b""
        self._made = asyncio.Event()  # replaced with each snapshot
        self._task: asyncio.Task[None] | None = None

    @property
    def num_viewers(self) -> int:
        return self._num_viewers

    @property
    def is_running(self) -> bool:
        return self._task is not None

    async def follow(self) -> AsyncIterator[bytes]:
        """Server-sent events from now on, until the router drains; close it to stop."""
        self._num_viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="ui publisher")
        task = self._task
        try:
            yield self._snapshots.opening()
            while not task.done():
                made = self._made
                await made.wait()
                yield self._latest
        finally:
            self._num_viewers -= 1
            if not self._num_viewers:
                await self.stop()

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        self._snapshots.start()
        reader = asyncio.create_task(self._snapshots.reader.run(), name="ui worker states")
        try:
            while not self._is_over():
                self._publish(self._snapshots.next())
                await asyncio.sleep(self._period_s)
        except Exception:
            log.exception("ui_publisher_failed")
            raise
        finally:
            self._snapshots.stop()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._publish(b": over\n\n")

    def _publish(self, event: bytes) -> None:
        self._latest = event
        made, self._made = self._made, asyncio.Event()
        made.set()
