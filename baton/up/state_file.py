"""The pid table of a run as JSON, so that tests and scripts can find the processes."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from baton.up.store import RunStore
from baton.up.supervisor import Supervisor


class StateFile:
    """Rewritten whole at every change, by rename: a reader never sees half of it."""

    def __init__(self, path: Path, *, url: str, store: RunStore, log_dir: Path, model: str) -> None:
        self._path = path
        self._store = store
        self._facts = {
            "pid": os.getpid(),
            "url": url,
            "redis_url": store.url,
            "log_dir": str(log_dir),
            "model": model,
        }

    def write(self, supervisor: Supervisor) -> None:
        processes = [status.as_json() for status in supervisor.statuses.values()]
        document = {
            **self._facts,
            "redis_pid": self._store.pid,
            "is_ready": supervisor.is_ready,
            "processes": processes,
        }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        temporary.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
