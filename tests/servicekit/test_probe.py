from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from servicekit.metrics import MetricsServer
from servicekit.probe import probe


@pytest.fixture
def port() -> Iterator[int]:
    server = MetricsServer(CollectorRegistry())
    yield server.start()
    server.stop()


def test_a_server_that_answers_is_healthy(port: int) -> None:
    command = [sys.executable, "-m", "servicekit.probe", f"http://127.0.0.1:{port}/metrics"]
    assert subprocess.run(command, check=False, timeout=30).returncode == 0


def test_nobody_listening_is_said() -> None:
    command = [sys.executable, "-m", "servicekit.probe", "http://127.0.0.1:1/"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, "refused" in ended.stderr) == (1, True)


def test_another_answer_than_200_is_said() -> None:
    server = MetricsServer(CollectorRegistry(), pages={"/broken": lambda: 1 / 0})
    port = server.start()
    try:
        failure = probe(f"http://127.0.0.1:{port}/broken")
    finally:
        server.stop()
    assert failure is not None
    assert failure.startswith("500 ")
