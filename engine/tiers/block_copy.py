"""Copies blocks between the device's cache and the host's, on any thread, beside the forward passes."""

from __future__ import annotations

import torch

from engine.block_runs import runs
from engine.kv_cache import KvCache


class BlockCopy:
    """On CUDA the bytes cross on streams of their own, between pinned memory and a buffer on the device;
    blocks of the cache itself are written on the default stream, in order with the forward passes."""

    def __init__(self, device: KvCache, host: KvCache) -> None:
        self._device = device
        self._host = host
        self._is_cuda = device.data.device.type == "cuda"
        self._saving = torch.cuda.Stream(device.data.device) if self._is_cuda else None
        self._loading = torch.cuda.Stream(device.data.device) if self._is_cuda else None

    def mark(self) -> torch.cuda.Event | None:
        """On the engine thread: what it has launched so far is in the blocks that are saved behind this."""
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.default_stream(self._device.data.device))
        return event

    @torch.inference_mode()
    def save(self, block_ids: list[int], slots: list[int], ready: torch.cuda.Event | None) -> None:
        """Device to host; the bytes are there on return."""
        if self._saving is None or ready is None:
            _copy_on_cpu(self._device, block_ids, self._host, slots)
            return
        with torch.cuda.stream(self._saving):
            self._saving.wait_event(ready)
            index = torch.tensor(block_ids, device=self._device.data.device)
            picked = self._device.data.index_select(1, index)
            for start, first_slot, length in runs(slots):
                for layer, blocks in enumerate(picked):
                    target = self._host.data[layer, first_slot : first_slot + length]
                    target.copy_(blocks[start : start + length], non_blocking=True)
            self._saving.synchronize()

    @torch.inference_mode()
    def load(self, slots: list[int], block_ids: list[int]) -> None:
        """Host to device. On return the slots may change, and what is launched next sees the blocks."""
        if self._loading is None:
            _copy_on_cpu(self._host, slots, self._device, block_ids)
            return
        data = self._device.data
        default = torch.cuda.default_stream(data.device)
        with torch.cuda.stream(self._loading):
            index = torch.tensor(block_ids, device=data.device)
            buffer = data.new_empty((data.shape[0], len(slots), *data.shape[2:]))
            for start, first_slot, length in runs(slots):
                for layer, blocks in enumerate(buffer):
                    source = self._host.data[layer, first_slot : first_slot + length]
                    blocks[start : start + length].copy_(source, non_blocking=True)
            self._loading.synchronize()
        with torch.cuda.stream(default):
            data.index_copy_(1, index, buffer)
            for tensor in (index, buffer):
                tensor.record_stream(default)


def _copy_on_cpu(source: KvCache, source_ids: list[int], target: KvCache, target_ids: list[int]) -> None:
    num_layers = source.layout.num_layers
    target.write_blocks(0, num_layers, target_ids, source.read_blocks(0, num_layers, source_ids))
