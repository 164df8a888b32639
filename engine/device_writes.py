"""Writes blocks that came from outside into a cache on a CUDA device, beside the forward passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.block_runs import common_runs, runs
from engine.side_stream import SideStream

_MAX_DIRECT_COPIES = 96  # of one write; in more pieces it is scattered on the device


class DeviceWrites:
    """On a stream of its own, one after another, from any thread."""

    def __init__(self, data: torch.Tensor) -> None:
        """data [layers, blocks, ...] on a CUDA device."""
        self._data = data
        self._stream = SideStream(data.device)
        self._idle = PinnedBuffers()

    def fence(self) -> torch.cuda.Event:
        """On the engine thread: what it has launched so far. A step that was run ahead may still write into
        blocks that a sequence has left."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._data.device))
        return event

    @torch.inference_mode()
    def write(
        self,
        layers: slice,
        block_ids: list[int],
        payload: memoryview | bytes,
        after: torch.cuda.Event | None,
    ) -> None:
        """Through pinned memory, behind `after`, or behind all that was launched so far. On return the blocks
        are written, and the payload may change."""
        with self._idle.holding(payload) as source, self._stream.behind(after):
            target = self._data[layers]
            values = source.view(self._data.dtype).view(target.shape[0], len(block_ids), *target.shape[2:])
            copy_in(values, target, block_ids)

    @torch.inference_mode()
    def copy(
        self,
        layers: slice,
        block_ids: list[int],
        source: torch.Tensor,
        source_ids: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        """As write(), of what is in these blocks of another cache [layers, blocks, ...] that this device can
        read. On return nothing reads the source any more."""
        with self._stream.behind(after):
            copy_across(source[layers], source_ids, self._data[layers], block_ids)

    @contextmanager
    def landing(self, num_bytes: int) -> Iterator[memoryview]:
        """Page-locked memory for what will be written: a payload that lies there is copied no more."""
        with self._idle.buffer(num_bytes) as pinned:
            yield pinned.numpy().data


class PinnedBuffers:
    """Of any thread, used over and over."""

    def __init__(self, *, is_pinned: bool = True) -> None:
        self._is_pinned = is_pinned
        self._idle: list[torch.Tensor] = []
        self._used: dict[int, torch.Tensor] = {}  # by address
        self._lock = threading.Lock()

    @contextmanager
    def buffer(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """uint8 [num_bytes]"""
        with self._lock:
            whole = self._idle.pop() if self._idle else torch.empty(0, dtype=torch.uint8)
        if whole.numel() < num_bytes:
            whole = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._used[whole.data_ptr()] = whole
        try:
            yield whole[:num_bytes]
        finally:
            with self._lock:
                del self._used[whole.data_ptr()]
                self._idle.append(whole)

    @contextmanager
    def holding(self, payload: memoryview | bytes) -> Iterator[torch.Tensor]:
        """A buffer with these bytes: the one they lie in, or another one."""
        source = np.frombuffer(payload, dtype=np.uint8)
        own = self._used.get(source.ctypes.data)
        if own is not None:
            yield own[: source.size]
            return
        with self.buffer(source.size) as pinned:
            pinned.numpy()[:] = source
            yield pinned


def copy_in(source: torch.Tensor, target: torch.Tensor, block_ids: list[int]) -> None:
    """source [layers, these blocks, ...] to target [layers, all blocks, ...]. Starts the copies."""
    pieces = list(runs(block_ids))
    if len(pieces) * target.shape[0] > _MAX_DIRECT_COPIES:
        index = torch.tensor(block_ids, device=target.device)
        words(target).index_copy_(1, index, words(source.to(target.device, non_blocking=True)))
        return
    for blocks, new in zip(target, source, strict=True):
        for start, first_id, length in pieces:
            blocks[first_id : first_id + length].copy_(new[start : start + length], non_blocking=True)


def copy_across(
    source: torch.Tensor, source_ids: list[int], target: torch.Tensor, target_ids: list[int]
) -> None:
    """Both [layers, all blocks, ...] and contiguous. Starts the copies."""
    pieces = list(common_runs(source_ids, target_ids))
    if len(pieces) * target.shape[0] > _MAX_DIRECT_COPIES:
        picked = words(source).index_select(1, torch.tensor(source_ids, device=source.device))
        words(target).index_copy_(1, torch.tensor(target_ids, device=target.device), picked)
        return
    for new, blocks in zip(source, target, strict=True):
        for source_id, target_id, length in pieces:
            blocks[target_id : target_id + length].copy_(
                new[source_id : source_id + length], non_blocking=True
            )


def words(blocks: torch.Tensor) -> torch.Tensor:
    """[layers, blocks, words] of the same bytes: the wider the words, the faster they are gathered."""
    flat = blocks.view(*blocks.shape[:2], -1)
    is_even = flat.shape[2] * flat.element_size() % torch.int64.itemsize == 0
    return flat.view(torch.int64 if is_even else torch.uint8)
