from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from kvstore import embedded
from kvstore.embedded import EmbeddedServer, EmbeddedServerFailed
from tests.fakes.redis_server import redis_server

PARENT = """
import sys
from kvstore.embedded import EmbeddedServer
server = EmbeddedServer()
print(server.start(), server.pid, flush=True)
sys.stdin.read()
"""


def test_it_listens_on_a_private_socket_only_and_writes_nothing() -> None:
    with redis_server() as (_, url), redis.Redis.from_url(url) as client:
        directory = Path(url.removeprefix("unix://")).parent
        assert directory.stat().st_mode & 0o077 == 0
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert 0 < int(client.config_get("maxmemory")["maxmemory"]) <= 1 << 30


def test_stop_ends_the_process_and_removes_its_directory() -> None:
    server = EmbeddedServer()
    directory = Path(server.start().removeprefix("unix://")).parent
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_comes_back_empty_at_the_same_url_after_a_crash() -> None:
    with redis_server() as (server, url), redis.Redis.from_url(url) as client:
        client.set("key", "value")
        server.kill()
        assert not server.is_running()
        assert server.start() == url
        assert client.get("key") is None


def test_it_measures_how_long_the_start_took() -> None:
    with redis_server() as (server, _):
        assert 0.0 < server.start_s < embedded.START_TIMEOUT_S


def test_it_dies_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        url, pid = parent.stdout.readline().split()
        descriptor = os.pidfd_open(int(pid))
        try:
            parent.send_signal(signal.SIGKILL)
            ended, _, _ = select.select([descriptor], [], [], 10.0)
            assert ended, "the server outlived its parent"
        finally:
            os.close(descriptor)
            directory = Path(url.removeprefix("unix://")).parent
            for left in directory.iterdir():
                left.unlink()
            directory.rmdir()


def test_ctrl_c_in_the_terminal_does_not_reach_it() -> None:
    with redis_server() as (server, _):
        assert server.pid is not None
        assert os.getpgid(server.pid) != os.getpgid(0)


def test_a_binary_that_cannot_start_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "server_binary", lambda: broken)
    monkeypatch.setattr(embedded.tempfile, "mkdtemp", lambda prefix: str(_made(tmp_path / "server")))
    server = EmbeddedServer()
    with pytest.raises(EmbeddedServerFailed, match="no such option"):
        server.start()
    assert not (tmp_path / "server").exists()
    assert not server.is_running()


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.1)
    server = EmbeddedServer()
    directory = Path(server.start().removeprefix("unix://")).parent
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not directory.exists()
    assert not server.is_running()
