from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from servicekit.process_env import (
    ensure_process_env,
    num_usable_cpus,
    threads_per_worker,
    tuned_environment,
)

RESTARTING = """
import os
from servicekit.process_env import ensure_process_env
print("start", flush=True)
ensure_process_env(os.environ, 3)
print(os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], os.getpid())
"""


def cgroup(root: Path, group: str, **files: str) -> None:
    directory = root / group.lstrip("/")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.fixture
def own_cgroup(tmp_path: Path) -> Path:
    return tmp_path / "self_cgroup"


def test_without_limits_affinity_counts(four_cpus: None, tmp_path: Path, own_cgroup: Path) -> None:
    assert num_usable_cpus(tmp_path / "no_cgroup", own_cgroup) == 4


def test_an_unlimited_group_does_not_count(four_cpus: None, tmp_path: Path, own_cgroup: Path) -> None:
    cgroup(tmp_path, "", cpu__max="max 100000\n")
    assert num_usable_cpus(tmp_path, own_cgroup) == 4


def test_the_quota_of_a_container_counts(four_cpus: None, tmp_path: Path, own_cgroup: Path) -> None:
    cgroup(tmp_path, "", cpu__max="150000 100000\n")
    assert num_usable_cpus(tmp_path, own_cgroup) == 1.5


def test_the_tightest_of_own_group_and_its_parents_counts(
    four_cpus: None, tmp_path: Path, own_cgroup: Path
) -> None:
    own_cgroup.write_text("0::/pods/pod-1/worker\n")
    cgroup(tmp_path, "pods/pod-1/worker", cpu__max="300000 100000\n")
    cgroup(tmp_path, "pods/pod-1", cpu__max="200000 100000\n")
    cgroup(tmp_path, "pods/pod-2", cpu__max="100000 100000\n")
    assert num_usable_cpus(tmp_path, own_cgroup) == 2


def test_version_1_groups_count(four_cpus: None, tmp_path: Path, own_cgroup: Path) -> None:
    own_cgroup.write_text("5:memory:/m\n4:cpu,cpuacct:/docker/abc\n")
    cgroup(tmp_path, "cpu,cpuacct/docker/abc", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    cgroup(tmp_path, "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert num_usable_cpus(tmp_path, own_cgroup) == 2.5


@pytest.mark.parametrize(
    ("num_workers", "num_cpus", "expected"),
    [(1, 2, 2), (2, 2, 1), (3, 2, 1), (2, 7, 3), (1, 0.5, 1), (4, 64, 16)],
)
def test_workers_share_the_cpus_and_each_has_at_least_one(
    num_workers: int, num_cpus: float, expected: int
) -> None:
    assert threads_per_worker(num_workers, num_cpus) == expected


def test_nothing_is_started_again_when_nothing_is_missing() -> None:
    def execve(*_: object) -> None:
        raise AssertionError("must not be called")

    ensure_process_env(tuned_environment(1) | {"HOME": "/"}, 4, execve=execve)


def test_what_is_set_already_wins() -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    environment = {"HOME": "/", "OMP_NUM_THREADS": "7"}
    ensure_process_env(environment, 2, ["python", "-m", "x"], lambda *call: calls.append(call))
    (call,) = calls
    assert call == (sys.executable, ["python", "-m", "x"], tuned_environment(2) | environment)


def test_a_program_starts_again_once_in_the_same_process() -> None:
    names = tuned_environment(1).keys()
    bare = {name: value for name, value in os.environ.items() if name not in names}
    with subprocess.Popen(
        [sys.executable, "-c", RESTARTING], env=bare, stdout=subprocess.PIPE, text=True
    ) as program:
        output, _ = program.communicate(timeout=30)
    assert output.split() == ["start", "start", "3", "PASSIVE", str(program.pid)]
