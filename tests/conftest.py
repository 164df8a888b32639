"""What is the same for all tests, and what must be set before any of their modules is imported."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

# Without a GPU kernels run under Triton's interpreter, which is chosen before any kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test is timed: a machine may be busy with something else.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """As in a new process: a test that configures logging as a service does leaves nothing to the next."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    root.setLevel(logging.WARNING)
    yield
    root.handlers[:] = handlers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of coroutines that takes too long is interrupted in the event loop; say what they wait for."""
    report = yield
    if call.excinfo is not None and "from pytest-timeout" in str(call.excinfo.value):
        # By type: isinstance() would ask proxies.
        tasks = [thing for thing in gc.get_objects() if issubclass(type(thing), asyncio.Task)]
        waits = [line for task in tasks if not task.done() for line in _waits(task)]
        report.sections.append(("Tasks that have not ended", "\n".join(waits)))
    return report


def _waits(task: asyncio.Task[object]) -> Iterator[str]:
    """From the task's coroutine to the one that waits, as far as they are Python's."""
    yield repr(task)
    coroutine: object = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield f"  {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        coroutine = getattr(coroutine, "cr_await", None)
