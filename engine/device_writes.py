"""Writes blocks that came from outside into a cache on a CUDA device, beside the forward passes."""

from __future__ import annotations

import threading

import numpy as np
import torch

from engine.block_runs import runs

_MAX_DIRECT_COPIES = 96  # of one write; in more pieces it is scattered on the device


class DeviceWrites:
    """On a stream of its own, through pinned memory. One write at a time, from any thread."""

    def __init__(self, data: torch.Tensor) -> None:
        """data [layers, blocks, ...] on a CUDA device."""
        self._data = data
        self._stream = torch.cuda.Stream(data.device)
        self._lock = threading.Lock()
        self._pinned = torch.empty(0, dtype=torch.uint8)

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
        """Behind `after`, or behind all that was launched so far. On return the blocks are written, and the
        payload may change."""
        with self._lock, torch.cuda.stream(self._stream):
            source = self._through_pinned(payload)
            if after is None:
                after = torch.cuda.Event()
                after.record(torch.cuda.default_stream(self._data.device))
            self._stream.wait_event(after)
            target = self._data[layers]
            values = source.view(self._data.dtype).view(target.shape[0], len(block_ids), *target.shape[2:])
            copy_in(values, target, block_ids)
            self._stream.synchronize()

    def _through_pinned(self, payload: memoryview | bytes) -> torch.Tensor:
        source = np.frombuffer(payload, dtype=np.uint8)
        if self._pinned.numel() < source.size:
            self._pinned = torch.empty(source.size, dtype=torch.uint8, pin_memory=True)
        pinned = self._pinned[: source.size]
        pinned.numpy()[:] = source
        return pinned


def copy_in(source: torch.Tensor, target: torch.Tensor, block_ids: list[int]) -> None:
    """source [layers, these blocks, ...] to target [layers, all blocks, ...]. Starts the copies."""
    pieces = list(runs(block_ids))
    if len(pieces) * target.shape[0] > _MAX_DIRECT_COPIES:
        index = torch.tensor(block_ids, device=target.device)
        target.index_copy_(1, index, source.to(target.device, non_blocking=True))
        return
    for blocks, new in zip(target, source, strict=True):
        for start, first_id, length in pieces:
            blocks[first_id : first_id + length].copy_(new[start : start + length], non_blocking=True)
