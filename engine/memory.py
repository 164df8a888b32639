"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(device: str, cgroup: Path = _CGROUP) -> int:
    """On the CPU the machine's available memory, or what is left of the container's limit if that is less."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    left = _container_bytes_left(cgroup)
    return available if left is None else max(0, min(available, left))


def _container_bytes_left(cgroup: Path) -> int | None:
    """None without a limit. Page cache counts as left: the kernel gives it back."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
