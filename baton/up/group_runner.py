"""Keeps one group of processes running.

1. All members are started.
2. They run until one ends by itself; the others are then stopped: a rank without its peers can do nothing.
3. The restart policy says when the group starts again, or that it has failed.
Cancelling `run` stops the members.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from baton.ports import free_port
from baton.subprocess_module import CODE_ROOT, module_argv
from baton.up.child_process import ChildProcess
from baton.up.log_line import parse_log_line
from baton.up.plan import DRAIN_S, WORKER_HOST, GroupSpec
from baton.up.process_status import ProcessState, ProcessStatus
from baton.up.restart_policy import RestartPolicy
from servicekit.process_env import tuned_environment

STOP_GRACE_S = DRAIN_S + 2.0  # between asking a process to end and killing it
_NUM_TAIL_LINES = 15
_PEER_GRACE_S = 2.0  # the same after a crash in the group: nothing is left to drain to

OnChange = Callable[[ProcessStatus], None]
OnLogLine = Callable[[ProcessStatus, str], None]


class GroupFailed(Exception):
    """A group ended too often. The message is for a person and has the last lines of its log."""


@dataclass(frozen=True, slots=True)
class _Exit:
    status: ProcessStatus
    exit_code: int
    last_lines: list[str]

    @property
    def reason(self) -> str:
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"


class GroupRunner:
    def __init__(
        self,
        group: GroupSpec,
        statuses: Mapping[str, ProcessStatus],
        environment: Mapping[str, str],
        on_change: OnChange,
        on_log_line: OnLogLine,
    ) -> None:
        self._group = group
        self._statuses = statuses
        self._environment = environment
        self._on_change = on_change
        self._on_log_line = on_log_line
        self._children: dict[str, ChildProcess] = {}
        self._policy = RestartPolicy()

    async def run(self) -> None:
        """Returns only by GroupFailed or cancellation."""
        try:
            while True:
                exited = await self._start_and_watch()
                was_ready = exited.status.state == "ready"
                self._set(exited.status, "restarting", exited.reason)
                await self._stop_members(_PEER_GRACE_S, "restarting")
                delay_s = self._policy.delay_after_exit(time.monotonic(), exited.exit_code, was_ready)
                if delay_s is None:
                    raise self._failed(exited)
                await asyncio.sleep(delay_s)
                self._group = self._group.with_rendezvous(f"{WORKER_HOST}:{free_port()}")
        finally:
            await self._stop_members(STOP_GRACE_S, "stopped")

    def kill(self) -> None:
        for child in self._children.values():
            child.send(signal.SIGKILL)

    async def _start_and_watch(self) -> _Exit:
        for spec in self._group.members:
            status = self._statuses[spec.name]
            status.num_starts += 1
            child = await ChildProcess.start(
                module_argv(spec.module),
                environment={**self._environment, **tuned_environment(spec.num_threads), **spec.environment},
                cwd=CODE_ROOT,
                log_path=status.log_path,
                on_line=lambda line, status=status: self._on_log_line(status, line),  # type: ignore[misc]
            )
            self._children[spec.name] = child
            status.pid = child.pid
            self._set(status, "starting", "")
        return await self._first_exit()

    async def _first_exit(self) -> _Exit:
        waits = {asyncio.create_task(child.wait()): name for name, child in self._children.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        name = min(waits[wait] for wait in done)
        exit_code = next(wait.result() for wait in done if waits[wait] == name)
        return _Exit(self._statuses[name], exit_code, list(self._children[name].last_lines))

    async def _stop_members(self, grace_s: float, state: ProcessState) -> None:
        async with asyncio.TaskGroup() as stops:
            for name in self._children:
                stops.create_task(self._stop_member(name, grace_s, state))
        self._children.clear()

    async def _stop_member(self, name: str, grace_s: float, state: ProcessState) -> None:
        status = self._statuses[name]
        if state == "stopped":
            self._set(status, "stopping", "")
        await self._children[name].stop(grace_s)
        status.pid = None
        self._set(status, state, status.detail or ("with its group" if state == "restarting" else ""))

    def _failed(self, exited: _Exit) -> GroupFailed:
        for spec in self._group.members:
            self._set(self._statuses[spec.name], "failed", exited.reason)
        name = exited.status.spec.name
        lines = [parse_log_line(line).text for line in exited.last_lines] or ["(no output)"]
        tail = "\n".join(f"  {name} | {line}" for line in lines[-_NUM_TAIL_LINES:])
        return GroupFailed(f"{name} {exited.reason} and is not started again; its last lines:\n{tail}")

    def _set(self, status: ProcessStatus, state: ProcessState, detail: str) -> None:
        status.state, status.detail = state, detail
        self._on_change(status)
