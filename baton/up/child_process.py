"""One child process: it cannot outlive us, its output goes to a file, its last lines are at hand."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OnLine = Callable[[str], None]

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 40
_OUTPUT_GRACE_S = 1.0
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork


class ChildProcess:
    """Created by `start`; ends in `stop`, or by itself."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path, on_line: OnLine) -> None:
        self._process = process
        self._on_line = on_line
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._output = asyncio.create_task(self._read_output(log_path))

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        log_path: Path,
        on_line: OnLine,
    ) -> ChildProcess:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=cwd,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on, in our order
            preexec_fn=die_with(os.getpid()),
        )
        return cls(process, log_path, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal, once its output has been read to the end."""
        exit_code = await self._process.wait()
        await asyncio.wait([self._output], timeout=_OUTPUT_GRACE_S)  # a grandchild may keep the pipe open
        return exit_code

    def send(self, signal_number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal_number)

    async def stop(self, grace_s: float) -> int:
        """Ask it to end, then make it. Returns the exit code."""
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                return await asyncio.shield(asyncio.ensure_future(self.wait()))
        except TimeoutError:
            self.send(signal.SIGKILL)
            return await self.wait()

    async def _read_output(self, log_path: Path) -> None:
        assert self._process.stdout is not None
        rest = b""
        with log_path.open("ab", buffering=0) as log:
            while data := await self._process.stdout.read(65536):
                log.write(data)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self.last_lines.append(text)
            self._on_line(text)


def die_with(parent_pid: int) -> Callable[[], None]:
    """Runs in the child before exec: the kernel kills it when its parent is gone, however the parent went."""

    def arrange() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent_pid:  # it went between fork and here
                os._exit(1)

    return arrange
