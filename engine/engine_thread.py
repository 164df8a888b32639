"""The thread that steps the engine, and the one way into it.

It sleeps on its command queue while there is nothing to compute. A command, a peer's doorbell, news of a load
and stop() are all entries of that queue, so none of them can be missed between looking and sleeping.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.engine import Engine
from engine.outputs import StepOutput

R = TypeVar("R")


class EngineStopped(RuntimeError):
    """The engine has failed or was stopped; the cause, if any, is __cause__."""


@dataclass(slots=True)
class _Command:
    run: Callable[[Engine], Any]
    future: Future[Any]


class EngineThread:
    """`on_step` hears every step and `on_failure` the one failure there may be, both on the engine thread,
    which leaves and closes the engine's expert-parallel group, and closes the engine, when it ends."""

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()  # None only wakes
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # between call() and the end of the thread
        self._has_ended = False
        self._stop_at: float | None = None  # monotonic; set by stop()
        self._failure: BaseException | None = None

    def start(self) -> None:
        if self._engine.ep is not None:
            self._engine.ep.subscribe(self._wake)
        self._engine.subscribe(self._wake)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Drop all sequences and end the thread after the step it is in; with expert parallelism, after all
        ranks of the group have stopped too. False when that took longer than timeout_s. Idempotent."""
        self._stop_at = time.monotonic() + timeout_s
        self._wake()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def call(self, fn: Callable[[Engine], R]) -> Future[R]:
        """Run `fn` on the engine thread between two steps, or while a device computes one. Its exception is
        the future's; EngineStopped when the engine has ended. From the engine thread itself (a callback):
        runs before the next step."""
        future: Future[R] = Future()
        with self._lock:
            if self._has_ended:
                future.set_exception(self._stopped())
            else:
                self._commands.put(_Command(fn, future))
        return future

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the owner must hear of it
            self._failure = error
        self._end()
        try:
            if self._failure is not None:
                self._on_failure(self._failure)
        finally:
            self._engine.close()
            if self._engine.ep is not None:
                self._engine.ep.close()

    def _loop(self) -> None:
        engine = self._engine
        while True:
            self._run_commands()
            if self._stop_at is not None and self._has_left(self._stop_at):
                return
            if engine.has_work or (engine.ep is not None and engine.ep.is_awake):
                self._on_step(engine.step(self._listen))
            else:
                self._wait()

    def _has_left(self, stop_at: float) -> bool:
        """A rank of a group may not go before the others: their collectives need it."""
        self._engine.abort_all()
        ep = self._engine.ep
        if ep is None:
            return True
        ep.leave()
        return ep.has_ended or time.monotonic() > stop_at

    def _wait(self) -> None:
        """For the next command; not beyond the time that stop() gave a group to end, or that a load gave
        itself."""
        timeout_s = None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())
        next_work_s = self._engine.next_work_s
        if next_work_s is not None:
            timeout_s = next_work_s if timeout_s is None else min(timeout_s, next_work_s)
        try:
            self._execute(self._commands.get(timeout=timeout_s))
        except queue.Empty:
            pass

    def _listen(self, seconds: float) -> None:
        """Commands, as they come; until then, or until the thread is to stop."""
        until = time.monotonic() + seconds
        while self._stop_at is None and (left_s := until - time.monotonic()) > 0.0:
            try:
                self._execute(self._commands.get(timeout=left_s))
            except queue.Empty:
                return

    def _run_commands(self) -> None:
        """Those that are there now; a command that a command adds waits for the next round."""
        for _ in range(self._commands.qsize()):
            self._execute(self._commands.get())

    def _execute(self, command: _Command | None) -> None:
        if command is None or not command.future.set_running_or_notify_cancel():
            return
        try:
            result = command.run(self._engine)
        except BaseException as error:  # noqa: BLE001 - belongs to the caller
            command.future.set_exception(error)
        else:
            command.future.set_result(result)

    def _end(self) -> None:
        with self._lock:
            self._has_ended = True
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None and command.future.set_running_or_notify_cancel():
                command.future.set_exception(self._stopped())

    def _stopped(self) -> EngineStopped:
        error = EngineStopped("the engine has failed" if self._failure else "the engine has stopped")
        error.__cause__ = self._failure
        return error

    def _wake(self) -> None:
        self._commands.put(None)
