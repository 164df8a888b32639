from __future__ import annotations

import asyncio
import time

from servicekit.clock import FakeClock, SystemClock


async def test_sleepers_wake_in_order_of_their_deadlines_and_not_before() -> None:
    clock = FakeClock(100.0)
    woken: list[float] = []

    async def sleep_until(deadline: float) -> None:
        await clock.sleep_until(deadline)
        woken.append(deadline)

    async with asyncio.TaskGroup() as tasks:
        for deadline in (103.0, 101.0, 102.0):
            tasks.create_task(sleep_until(deadline))
        await asyncio.sleep(0)
        clock.advance(0.5)
        await asyncio.sleep(0)
        assert woken == []
        clock.advance(1.5)
        await asyncio.sleep(0)
        assert woken == [101.0, 102.0]
        clock.advance(10.0)
    assert woken == [101.0, 102.0, 103.0]
    assert clock.monotonic() == 112.0


async def test_a_past_deadline_does_not_wait() -> None:
    clock = FakeClock(5.0)
    async with asyncio.timeout(1):
        await clock.sleep_until(5.0)


async def test_a_cancelled_sleeper_does_not_disturb_the_others() -> None:
    clock = FakeClock()
    cancelled = asyncio.create_task(clock.sleep_until(1.0))
    other = asyncio.create_task(clock.sleep_until(1.0))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    clock.advance(1.0)
    async with asyncio.timeout(1):
        await other


async def test_the_system_clock_sleeps_until_its_deadline() -> None:
    clock = SystemClock()
    deadline = clock.monotonic() + 0.02
    await clock.sleep_until(deadline)
    assert time.monotonic() >= deadline
