from __future__ import annotations

import asyncio
import threading

import pytest

from worker.cancellation import check_cancelled, run_in_thread


async def test_cancelled_task_is_told_even_when_the_exception_was_swallowed() -> None:
    went_on = False

    async def swallow() -> None:
        nonlocal went_on
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        check_cancelled()
        went_on = True

    task = asyncio.create_task(swallow())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not went_on


async def test_task_that_nobody_cancelled_goes_on() -> None:
    check_cancelled()
    await asyncio.sleep(0)
    check_cancelled()


async def test_timeout_that_was_swallowed_is_still_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
            check_cancelled()


async def test_thread_gives_result_and_error() -> None:
    assert await run_in_thread(int, "7") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        await run_in_thread(int, "x")


async def test_cancellation_waits_for_the_thread() -> None:
    entered, may_end = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert may_end.wait(20)

    task = asyncio.create_task(run_in_thread(work))
    await asyncio.to_thread(entered.wait, 20)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
