from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from servicekit.lifecycle import drain_on_signals

SERVICE = """
import asyncio
from servicekit.lifecycle import drain_on_signals

async def main():
    with drain_on_signals() as drain:
        print("ready", flush=True)
        await drain.wait()
        print("draining", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_to_drain(number: signal.Signals) -> None:
    codes: list[int] = []
    with drain_on_signals(codes.append) as drain:
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            await drain.wait()
    assert codes == []


async def test_the_second_signal_exits_with_the_shells_code() -> None:
    exited: asyncio.Queue[int] = asyncio.Queue()
    with drain_on_signals(exited.put_nowait) as drain:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await drain.wait()
            os.kill(os.getpid(), signal.SIGINT)
            assert await exited.get() == 130


async def test_handlers_are_removed_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with drain_on_signals():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_service_that_hangs_while_draining_ends_with_the_second_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVICE], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "ready\n"
        service.send_signal(signal.SIGTERM)
        assert service.stdout.readline() == "draining\n"
        service.send_signal(signal.SIGTERM)
        assert service.wait(10) == 143
