"""Threads beside the engine's: work goes on there, what follows from it happens on the engine thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")


class BackgroundThreads:
    """Belongs to the engine thread."""

    def __init__(self, name: str, on_done: Callable[[], None], num_threads: int = 1) -> None:
        """on_done() from any thread, whenever poll() has something to do. One thread works in the order of
        submission."""
        self.num_open = 0  # submitted, and not followed up
        self._on_done = on_done
        self._done: deque[Callable[[], None]] = deque()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def submit(self, work: Callable[[], R], then: Callable[[Future[R]], None]) -> None:
        self.num_open += 1

        def done(future: Future[R]) -> None:
            self._done.append(lambda: then(future))
            self._on_done()

        self._executor.submit(work).add_done_callback(done)

    def poll(self) -> None:
        """What follows from the work that is done. Raises what a `then` raises."""
        while self._done:
            self.num_open -= 1
            self._done.popleft()()

    def close(self) -> None:
        """Waits for the work that goes on; the rest, and what would follow, is dropped. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)
