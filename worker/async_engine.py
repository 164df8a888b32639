"""The engine thread seen from the event loop.

Everything the engine says about one sequence reaches the loop in the order in which the engine thread said
it: listeners, call-backs and step outputs all go through `in_loop`, which is first in, first out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from engine.engine import Engine
from engine.engine_thread import EngineStopped, EngineThread
from engine.grammar.compiler import GrammarCompiler
from engine.outputs import SequenceOutput, StepOutput
from engine.step_stats import EngineLoad
from servicekit.errors import WorkerLost
from servicekit.logging import get_logger

R = TypeVar("R")
OutputSink = Callable[[SequenceOutput], None]

log = get_logger(__name__)


class AsyncEngine:
    """Owns the engine thread; must be made in the event loop that uses it."""

    def __init__(self, engine: Engine, grammars: GrammarCompiler | None = None) -> None:
        """Closes `grammars`. Without: sequences with a grammar are refused."""
        self.engine = engine  # for its immutable facts only; state is touched through call() and post()
        self.grammars = grammars
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(engine, on_step=self._on_step, on_failure=self._on_failure)
        self._sinks: dict[int, OutputSink] = {}
        self._step_listeners: list[Callable[[StepOutput], None]] = []
        self._load_listeners: list[Callable[[EngineLoad], None]] = []
        self._seq_ids = itertools.count(1)

    def start(self) -> None:
        self._thread.start()

    async def stop(self, timeout_s: float) -> bool:
        """Drops all sequences; False when the engine, or another rank of its group, did not end in time."""
        if self.grammars is not None:
            self.grammars.close()
        return await asyncio.to_thread(self._thread.stop, timeout_s)

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    def subscribe(self, listener: Callable[[StepOutput], None]) -> None:
        """Called in the loop after each step, after the sinks."""
        self._step_listeners.append(listener)

    def subscribe_load(self, listener: Callable[[EngineLoad], None]) -> None:
        """Called in the loop when something but a step changed the load."""
        self._load_listeners.append(listener)

    def attach(self, seq_id: int, sink: OutputSink) -> None:
        """Send the outputs of one sequence to `sink`, in the loop, until detach."""
        self._sinks[seq_id] = sink

    def detach(self, seq_id: int) -> None:
        self._sinks.pop(seq_id, None)

    async def call(self, function: Callable[[Engine], R]) -> R:
        """Run between two steps. Cancelled before it ran: it does not run; later: its result is dropped.

        Raises what `function` raises, and WorkerLost when the engine has ended."""
        try:
            return await asyncio.wrap_future(self._thread.call(function))
        except EngineStopped as error:
            raise _as_worker_lost(error) from error

    def send(self, function: Callable[[Engine], object], on_failure: Callable[[BaseException], None]) -> None:
        """Run between two steps without waiting: two threads and a task less to wake than with call().
        on_failure is called in the loop with what call() would raise."""

        def run_ended(future: Future[Any]) -> None:
            error = future.exception()
            if error is not None:
                self.in_loop(on_failure, _as_worker_lost(error))

        self._thread.call(function).add_done_callback(run_ended)

    def post(self, function: Callable[[Engine], object]) -> None:
        """Run between two steps without waiting, for clean-up that must not be cancelled."""

        def run(engine: Engine) -> None:
            function(engine)
            # Perhaps no step follows that would tell.
            self.in_loop(self._deliver_load, engine.load())

        self._thread.call(run).add_done_callback(_log_failure)

    def in_loop(self, function: Callable[..., object], *args: object) -> None:
        """From the engine thread: run in the event loop, after everything sent earlier."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _on_step(self, step: StepOutput) -> None:
        self.in_loop(self._deliver, step)

    def _on_failure(self, error: BaseException) -> None:
        self.in_loop(self._fail, error)

    def _deliver(self, step: StepOutput) -> None:
        for output in step.outputs:
            sink = self._sinks.get(output.seq_id)
            if sink is not None:
                sink(output)
        for listener in self._step_listeners:
            listener(step)

    def _deliver_load(self, load: EngineLoad) -> None:
        for listener in self._load_listeners:
            listener(load)

    def _fail(self, error: BaseException) -> None:
        if not self.failure.done():
            self.failure.set_result(error)


def _as_worker_lost(error: BaseException) -> BaseException:
    """Unless it is another error than that the engine has ended."""
    if not isinstance(error, EngineStopped):
        return error
    return WorkerLost(f"{error}: {error.__cause__}" if error.__cause__ else str(error))


def _log_failure(future: Future[Any]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, EngineStopped):
        log.error("engine_cleanup_failed", reason=repr(error))
