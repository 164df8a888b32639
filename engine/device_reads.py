"""Reads blocks off a CUDA device into host memory, beside the forward passes."""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.block_runs import runs
from engine.device_writes import PinnedBuffers, words
from engine.side_stream import SideStream

_MAX_DIRECT_COPIES = 96  # of one rectangle; in more pieces it is gathered on the device first


class DeviceReads:
    """On a stream of its own, through pinned memory, from any thread."""

    def __init__(self, data: torch.Tensor) -> None:
        """data [layers, blocks, ...] on a CUDA device."""
        self._data = data
        self._stream = SideStream(data.device)
        self._idle = PinnedBuffers()

    @torch.inference_mode()
    def read(self, layers: slice, block_ids: list[int]) -> memoryview:
        """Waits for what was launched so far."""
        source = self._data[layers]
        shape = (source.shape[0], len(block_ids), *source.shape[2:])
        with self._idle.buffer(math.prod(shape) * source.element_size()) as pinned:
            with self._stream.behind(None):
                copy_out(source, block_ids, pinned.view(source.dtype).view(shape), 0)
            return np.copy(pinned.numpy()).data


def copy_out(source: torch.Tensor, block_ids: list[int], target: torch.Tensor, first_slot: int) -> None:
    """source and target [layers, blocks, ...]; the slots are a run. Starts the copies."""
    pieces = list(runs(block_ids))
    if len(pieces) * source.shape[0] > _MAX_DIRECT_COPIES:
        source = words(source).index_select(1, torch.tensor(block_ids, device=source.device))
        target = words(target)
        pieces = [(0, 0, len(block_ids))]
    for blocks, slots in zip(source, target, strict=True):
        for start, first_id, length in pieces:
            new = blocks[first_id : first_id + length]
            slots[first_slot + start : first_slot + start + length].copy_(new, non_blocking=True)
