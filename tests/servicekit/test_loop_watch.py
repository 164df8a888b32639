from __future__ import annotations

import asyncio
import threading
import time

import pytest

from servicekit.loop_watch import watched_loop


def hold_the_loop(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)  # lets the thread look


async def _hold_once(seconds: float) -> None:
    with watched_loop():
        await asyncio.sleep(0.02)
        hold_the_loop(seconds)
        await asyncio.sleep(0.02)


def test_who_held_the_loop_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    asyncio.run(_hold_once(0.2))
    held = [r.fields for r in caplog.records if r.message == "loop_held"]  # type: ignore[attr-defined]
    [longest] = [each for each in held if each["held_s"] > 0.15]
    assert "hold_the_loop" in longest["where"]
    assert longest["computing_s"] < 0.1  # it slept most of the time
    assert not any(thread.name == "loop-watch" for thread in threading.enumerate())


def test_nothing_watches_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def names() -> set[str]:
        with watched_loop():
            return {thread.name for thread in threading.enumerate()}

    assert "loop-watch" not in asyncio.run(names())
