"""Two ways in which a cancellation must not be lost or come too early."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def check_cancelled() -> None:
    """Raises CancelledError when this task was cancelled. Call it where an AioRpcError is taken for an
    answer: grpc.aio raises that alone when a cancellation meets a refused connection."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def run_in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Like asyncio.to_thread, but a cancellation waits for the thread, which cannot be stopped half-way: when
    this has returned or raised, `function` touches nothing any more."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation matters more
        raise
