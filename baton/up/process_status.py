"""What is known about one supervised process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baton.up.plan import ProcessSpec

ProcessState = Literal["waiting", "starting", "ready", "restarting", "stopping", "stopped", "failed"]


@dataclass(slots=True)
class ProcessStatus:
    spec: ProcessSpec
    group: str
    log_path: Path
    state: ProcessState = "waiting"
    pid: int | None = None
    detail: str = ""  # what it does while it starts, or why it is in this state
    num_starts: int = 0
    incarnation: str = ""  # the registration that made it ready

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "role": self.spec.role,
            "group": self.group,
            "ep_rank": self.spec.ep_rank,
            "pid": self.pid,
            "state": self.state,
            "address": self.spec.address,
            "metrics_address": self.spec.metrics_address,
            "num_threads": self.spec.num_threads,
            "num_restarts": max(0, self.num_starts - 1),
            "log": str(self.log_path),
        }
