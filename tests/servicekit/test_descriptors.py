from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import os, resource, socket
from servicekit.descriptors import reserve_descriptors

def table_size():
    [line] = [line for line in open("/proc/self/status") if line.startswith("FDSize")]
    return int(line.split()[1])

resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
is_full = {is_full}
if is_full:
    os.dup2(0, {hard} - 1)
reserve_descriptors({num})
size = table_size()
sockets = [socket.socket() for _ in range({num_opened})]
print(size, table_size(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd")))
"""


def run(**values: int | bool) -> list[int]:
    """Size of the table, and after some were opened; the soft limit; descriptors open then."""
    program = _PROGRAM.format(**{"is_full": False, "num_opened": 900, **values})
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    return [int(word) for word in found.stdout.split()]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_table_does_not_grow_when_sockets_are_opened() -> None:
    before, after, soft, num_open = run(soft=1024, hard=4096, num=2048)
    assert before == after >= 2048
    assert soft == 2048
    assert 900 <= num_open < 910  # nothing is left open


def test_it_grows_without() -> None:
    before, after, *_ = run(soft=1024, hard=4096, num=1)
    assert before < after


def test_no_more_is_asked_for_than_the_process_may_have() -> None:
    before, after, soft, _ = run(soft=512, hard=1000, num=2048)
    assert before == after >= 1000
    assert soft == 1000


def test_a_higher_limit_stays() -> None:
    *_, soft, _ = run(soft=4000, hard=4096, num=2048)
    assert soft == 4000


def test_a_last_descriptor_in_use_is_left_alone() -> None:
    before, *_ = run(soft=1024, hard=1024, num=2048, is_full=True, num_opened=10)
    assert before >= 1024
