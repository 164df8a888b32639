"""Environment that must be there before a worker process starts, and how many threads it should use.

OpenMP and the C allocator read these variables once, at start. On two shared cores they are worth a factor of
five and more: a spinning barrier waits for a preempted thread, and freed MiB-sized buffers fault in again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")

# Rounds that a waiting OpenMP thread spins before it sleeps: enough to bridge the gap to the next operator (a
# wake-up costs more than most of them), too few to hold a core against another process (docs/log.md).
_SPIN_COUNT = 20_000


def tuned_environment(num_threads: int) -> dict[str, str]:
    """Variables for a process that computes with `num_threads` threads."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": str(_SPIN_COUNT),
        "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


def num_usable_cpus(cgroup_root: Path = _CGROUP_ROOT, own_cgroup: Path = _OWN_CGROUP) -> float:
    """CPUs this process may use: its affinity and the tightest quota of its control groups (v1 and v2)."""
    try:
        num_cpus = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        num_cpus = float(os.cpu_count() or 1)
    return min([num_cpus, *_cgroup_quotas(cgroup_root, own_cgroup)])


def threads_per_worker(num_workers: int, num_cpus: float | None = None) -> int:
    """Threads for each of `num_workers` computing processes, so that together they fit this machine."""
    assert num_workers >= 1
    return max(1, int((num_usable_cpus() if num_cpus is None else num_cpus) / num_workers))


def ensure_process_env(
    environment: Mapping[str, str],
    num_threads: int,
    argv: Sequence[str] | None = None,
    execve: Callable[[str, list[str], dict[str, str]], object] = os.execve,
) -> None:
    """Start this program again, in place, with tuned_environment() where a variable is missing.

    Variables that are set already win. Call it before importing torch; it returns when nothing is missing, as
    is always so the second time.
    """
    missing = {
        name: value for name, value in tuned_environment(num_threads).items() if name not in environment
    }
    if missing:
        execve(sys.executable, list(sys.orig_argv if argv is None else argv), {**environment, **missing})


def _cgroup_quotas(root: Path, own: Path) -> list[float]:
    quotas = []
    for directory in _cgroup_directories(root, own):
        quota = _read_quota(directory)
        if quota is not None:
            quotas.append(quota)
    return quotas


def _cgroup_directories(root: Path, own: Path) -> list[Path]:
    """Own group first, then its ancestors, in the unified and in the cpu hierarchy."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    directories = [root, root / "cpu"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = Path(path.lstrip("/"))
        directories += [base / part for part in (group, *group.parents)]
    return directories


def _read_quota(directory: Path) -> float | None:
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
