"""/healthz and /readyz of a worker, for whoever starts it again or sends it requests.

A worker that still loads its weights answers neither: nobody listens yet.
"""

from __future__ import annotations

import asyncio
import threading

from worker.admission import Admission
from worker.async_engine import AsyncEngine
from worker.registration import Registration

_LOOP_ANSWERS_S = 2.0


class WorkerHealth:
    """Each check gives None or what is wrong. They are called on other threads than the loop's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: AsyncEngine,
        admission: Admission,
        loop_answers_s: float = _LOOP_ANSWERS_S,
    ) -> None:
        self._loop = loop
        self._engine = engine
        self._admission = admission
        self._loop_answers_s = loop_answers_s
        self._registration: Registration | None = None

    def watch(self, registration: Registration) -> None:
        """From here on the worker can become ready."""
        self._registration = registration

    def alive(self) -> str | None:
        """None: this process reacts and its engine has not failed, so starting it again would not help."""
        if self._engine.failure.done():
            return "the engine failed"
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:
            return "the event loop has ended"
        if not answered.wait(self._loop_answers_s):
            return f"the event loop did not answer within {self._loop_answers_s:g} s"
        return None

    def ready(self) -> str | None:
        """None: routers may find it. Losing Redis changes nothing: it serves those that know it."""
        if self._registration is None or not self._registration.is_announced.is_set():
            return "not in the registry yet"
        if self._admission.is_draining:
            return "draining"
        return None
