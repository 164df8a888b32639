"""How a service ends: the first SIGTERM or SIGINT asks it to drain, the second ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from servicekit.logging import get_logger

log = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def drain_on_signals(exit_now: Callable[[int], object] = os._exit) -> Iterator[asyncio.Event]:
    """The event that the first signal sets. Needs a running loop on the main thread.

    The second signal calls `exit_now` with the shell's code for that signal, 128 + its number.
    """
    loop = asyncio.get_running_loop()
    drain = asyncio.Event()

    def receive(number: signal.Signals) -> None:
        if drain.is_set():
            log.warning("exiting_now", signal=number.name)
            exit_now(128 + number)
        else:
            log.info("draining", signal=number.name)
            drain.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, receive, number)
    try:
        yield drain
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
