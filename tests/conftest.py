"""What must be set before any test module is imported, and what a test that hangs was doing."""

from __future__ import annotations

import asyncio
import gc
import io
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
def log_level() -> Iterator[None]:
    """Of each test: what configures logging as a service does leaves nothing of it to the next."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of coroutines that takes too long is interrupted in the event loop; say what they wait for."""
    report = yield
    if call.excinfo is not None and "from pytest-timeout" in str(call.excinfo.value):
        stacks = io.StringIO()
        for task in [thing for thing in gc.get_objects() if issubclass(type(thing), asyncio.Task)]:
            if not task.done():
                task.print_stack(file=stacks)
        report.sections.append(("Tasks that have not ended", stacks.getvalue()))
    return report
