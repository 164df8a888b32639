from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from servicekit.host import host_id, reachable_host

SHOW = "from servicekit.host import host_id; print(host_id(), end='')"


def test_another_process_of_this_host_has_the_same_id() -> None:
    if not Path("/proc/self/ns/pid").exists():
        pytest.skip("this system has no /proc")
    other = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert other.stdout == host_id()


def test_another_boot_another_pid_namespace_and_another_user_have_other_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot_a, boot_b = tmp_path / "boot_a", tmp_path / "boot_b"
    boot_a.write_text("a\n")
    boot_b.write_text("b\n")
    (tmp_path / "pids").mkdir()
    (tmp_path / "other_pids").mkdir()
    ids = [host_id(boot_a, tmp_path / "pids"), host_id(boot_b, tmp_path / "pids")]
    ids.append(host_id(boot_a, tmp_path / "other_pids"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    host_id.cache_clear()
    ids.append(host_id(boot_a, tmp_path / "pids"))
    assert len(set(ids)) == 4


def test_where_the_system_does_not_tell_nobody_shares(tmp_path: Path) -> None:
    first = host_id(tmp_path / "missing", tmp_path)
    assert host_id(tmp_path / "missing", tmp_path) == first
    host_id.cache_clear()
    assert host_id(tmp_path / "missing", tmp_path) != first


@pytest.mark.parametrize("host", ["127.0.0.1", "worker-3", "::1"])
def test_a_named_host_is_reached_under_its_name(host: str) -> None:
    assert reachable_host(host, "redis://127.0.0.1:6379") == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", ""])
def test_a_wildcard_is_reached_at_the_interface_that_faces_the_server(host: str) -> None:
    assert reachable_host(host, "redis://:secret@127.0.0.1:6379/0") == "127.0.0.1"


@pytest.mark.parametrize("url", ["redis://no-such-host.invalid", "unix:///run/redis.sock"])
def test_without_a_server_to_face_a_wildcard_is_reached_under_the_machine_s_name(url: str) -> None:
    assert reachable_host("0.0.0.0", url) == socket.gethostbyname(socket.gethostname())
