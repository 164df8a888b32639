# mypy: disable-error-code="no-untyped-def,import-untyped"
"""Compiles kernels side by side, before they are needed.

Triton compiles a kernel where it is first launched, one after another: with an empty cache that is most of a
start. So a start first rehearses its steps: a launch then only tells Triton which kernel is missing, threads
compile it (passes, LLVM and ptxas run without Python's lock), and nothing runs on the device but torch's own
operators. They read memory that the kernels would have written, so none may take indices from there.

Triton has both parts, compiling by an executor (AsyncCompileMode) and launches that only compile (`warmup`),
but no way to ask for the latter around code that launches. That is made here, for the thread that rehearses.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_logger = logging.getLogger(__name__)
MAX_THREADS = 16

_is_rehearsing: ContextVar[bool] = ContextVar("_is_rehearsing", default=False)
_patch = threading.Lock()  # one start of a process at a time


def compile_ahead(rehearse: Callable[[], object]) -> None:
    """Calls it, and returns when the kernels that it launches are compiled; none of them runs. What fails is
    left to the launch that needs it. Does nothing where that gains nothing or Triton cannot do it."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    if num_threads < 2 or not _can_rehearse():
        return
    from triton import AsyncCompileMode

    try:
        with (
            ThreadPoolExecutor(num_threads, "compile") as threads,
            AsyncCompileMode(_Compilers(threads), ignore_errors=True),
            _launches_only_compile(),
        ):
            rehearse()
    except Exception as failure:  # noqa: BLE001 - whatever it is, without this the start is only slower
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        _logger.warning("kernels are compiled when they are first launched: %s", reason)


class _Compilers:
    """The executor: compiles a kernel, and in C what launches it, which some releases of Triton leave to the
    first launch."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self._threads.submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], Any]) -> Any:
        from triton.runtime import driver

        kernel = compile_kernel()
        make_launcher = getattr(driver.active, "launcher_cls", None)
        if make_launcher is not None:
            # Most kernels of a function have the same: it is compiled once, and then found in the cache.
            with self._locks[kernel.src.name]:
                make_launcher(kernel.src, kernel.metadata)
        return kernel


def _can_rehearse() -> bool:
    try:
        import triton
        from triton.runtime.jit import JITFunction, KernelInterface
    except ImportError:
        return False
    return (
        hasattr(triton, "AsyncCompileMode")
        and not triton.knobs.runtime.interpret
        and JITFunction.__getitem__ is KernelInterface.__getitem__
        and {"grid", "warmup"} <= inspect.signature(JITFunction.run).parameters.keys()
    )


@contextmanager
def _launches_only_compile() -> Iterator[None]:
    """Those of this thread."""
    from triton.runtime.jit import KernelInterface

    def launcher(kernel, grid):
        if not _is_rehearsing.get():
            return launcher_before(kernel, grid)
        return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)

    with _patch:
        launcher_before = KernelInterface.__getitem__
        KernelInterface.__getitem__ = launcher
        token = _is_rehearsing.set(True)
        try:
            yield
        finally:
            _is_rehearsing.reset(token)
            KernelInterface.__getitem__ = launcher_before
