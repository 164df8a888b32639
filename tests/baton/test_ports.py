from __future__ import annotations

import itertools
import socket

import pytest

from baton import ports


def test_every_port_is_another_and_none_is_one_that_connections_get() -> None:
    found = [ports.free_port() for _ in range(20)]
    assert len(set(found)) == 20
    assert all(10_000 <= port < 32_768 for port in found)


def test_a_port_that_something_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.free_port()))
        taken.listen()
        place = taken.getsockname()[1] - 10_000
        monkeypatch.setattr(ports, "_places", itertools.count(place))
        assert ports.free_port() > place + 10_000


def test_after_the_last_port_comes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "bind_error", lambda host, port: None)
    monkeypatch.setattr(ports, "_places", itertools.count(32_767 - 10_000))
    assert [ports.free_port(), ports.free_port()] == [32_767, 10_000]
