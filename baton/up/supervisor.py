"""Runs all groups of one `baton up` and knows the state of every process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from baton.up.group_runner import GroupFailed, GroupRunner, OnChange, OnLogLine
from baton.up.plan import GroupSpec
from baton.up.process_status import ProcessStatus


class Supervisor:
    """`run` until cancelled; cancelling it stops every process."""

    def __init__(
        self,
        groups: Iterable[GroupSpec],
        environment: Mapping[str, str],
        log_dir: Path,
    ) -> None:
        self.groups = list(groups)
        self.statuses = {
            spec.name: ProcessStatus(spec, group.name, log_dir / f"{spec.name}.log")
            for group in self.groups
            for spec in group.members
        }
        self._change_listeners: list[OnChange] = []
        self._log_listeners: list[OnLogLine] = []
        self._changed = asyncio.Event()
        self._was_ready = False
        self._runners = {
            group.name: GroupRunner(group, self.statuses, environment, self._tell, self._pass_on)
            for group in self.groups
        }

    def on_change(self, listener: OnChange) -> None:
        self._change_listeners.append(listener)

    def on_log_line(self, listener: OnLogLine) -> None:
        self._log_listeners.append(listener)

    async def run(self) -> None:
        """Raises GroupFailed when what is left cannot serve.

        That is any group before all were ready; later the router or the last decode group.
        """
        tasks = {asyncio.create_task(self._runners[group.name].run()): group for group in self.groups}
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._judge(task, tasks.pop(task))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self) -> None:
        for runner in self._runners.values():
            runner.kill()

    def mark_ready(self, name: str, incarnation: str = "") -> None:
        """Ignored unless it is starting, and for the registration of the process before this one."""
        status = self.statuses[name]
        if status.state == "starting" and (not incarnation or incarnation != status.incarnation):
            status.state, status.detail, status.incarnation = "ready", "", incarnation
            self._tell(status)

    @property
    def is_ready(self) -> bool:
        return all(status.state == "ready" for status in self.statuses.values())

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _judge(self, task: asyncio.Task[None], group: GroupSpec) -> None:
        error = task.exception()
        assert error is not None, f"{group.name} ended without a reason"
        if not isinstance(error, GroupFailed):
            raise error
        failed = {s.group for s in self.statuses.values() if s.state == "failed"}
        has_decode = any(g.role == "decode" and g.name not in failed for g in self.groups)
        if group.role == "router" or not has_decode or not self._was_ready:
            raise error

    def _tell(self, status: ProcessStatus) -> None:
        self._was_ready = self._was_ready or self.is_ready
        self._changed.set()
        for listener in self._change_listeners:
            listener(status)

    def _pass_on(self, status: ProcessStatus, line: str) -> None:
        for listener in self._log_listeners:
            listener(status, line)
