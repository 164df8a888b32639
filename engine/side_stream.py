"""A stream of a CUDA device beside that of the forward passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """One user at a time, of any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()

    @contextmanager
    def behind(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """The current stream inside the block, behind `after` or all that was launched so far. What is
        launched inside is done when the block is left."""
        with self._lock, torch.cuda.stream(self._stream):
            if after is None:
                after = torch.cuda.Event()
                after.record(torch.cuda.default_stream(self._device))
            self._stream.wait_event(after)
            try:
                yield
            finally:
                self._stream.synchronize()
