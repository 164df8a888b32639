"""What held the event loop, in the log at level DEBUG.

While something holds the loop no stream of the process gets a token. A thread looks at the loop every few
milliseconds, and where it finds that it has not been round for a while, says what it is doing. How much of
the time the loop's thread was computing tells whether that was the cause, or another thread or process.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from servicekit.logging import get_logger

log = get_logger(__name__)

_ROUND_S = 0.002
_HELD_S = 0.006
_NUM_FRAMES = 6  # the innermost


@contextmanager
def watched_loop() -> Iterator[None]:
    """Inside, the running loop; nothing is watched unless the log shows level DEBUG."""
    if not log.shows_debug:
        yield
        return
    watch = _Watch(asyncio.get_running_loop())
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class _Watch:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._round_at = time.monotonic()
        self._computed_s = time.thread_time()
        self._seen = ""  # by the thread, in the present round
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loop-watch", daemon=True)

    def start(self) -> None:
        self._timer = self._loop.call_later(_ROUND_S, self._turn)
        self._thread.start()

    def stop(self) -> None:
        """In the loop."""
        self._is_over.set()
        if self._timer is not None:
            self._timer.cancel()
        self._thread.join()

    def _turn(self) -> None:
        now, computed_s = time.monotonic(), time.thread_time()
        held_s = now - self._round_at - _ROUND_S
        if held_s > _HELD_S:
            # Nothing was seen where the thread could not run either.
            busy_s = computed_s - self._computed_s
            log.debug("loop_held", held_s=held_s, computing_s=busy_s, ended_at=now, where=self._seen)
        self._seen, self._round_at, self._computed_s = "", now, computed_s
        self._timer = self._loop.call_later(_ROUND_S, self._turn)

    def _look(self) -> None:
        while not self._is_over.wait(_ROUND_S):
            if not self._seen and time.monotonic() - self._round_at > _HELD_S:
                self._seen = self._where()

    def _where(self) -> str:
        """Innermost first."""
        frame: FrameType | None = sys._current_frames().get(self._loop_thread)
        found: list[str] = []
        while frame is not None and len(found) < _NUM_FRAMES:
            code = frame.f_code
            found.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {code.co_qualname}")
            frame = frame.f_back
        return " < ".join(found)
