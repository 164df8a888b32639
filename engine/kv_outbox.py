"""Host copies of blocks on their way to another worker, where the cache itself is on a device.

KV that is handed off leaves the device while later layers are computed: a copy starts when the layers in
front of it are done, on a stream of its own, into memory that other processes of the host can open. Who reads
it waits for no forward pass.

A reader that can open the device's cache itself needs no copies and takes no slots: it only has to hear when
the device has got there.

A sequence has its slots from its start to its end. Slots of an ended one are used again at once: copies are
made in order, and nobody reads slots of a sequence that has ended.
"""

from __future__ import annotations

import queue
import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.device_reads import copy_out
from engine.kv_cache import KvCache
from engine.pinned_memory import pin, unpin


@dataclass(frozen=True, slots=True)
class OutboxCopy:
    """Layers [first_layer, first_layer + num_layers) of these blocks, to these slots."""

    first_layer: int
    num_layers: int
    block_ids: list[int]
    slots: list[int]


@dataclass(frozen=True, slots=True)
class _Job:
    copy: OutboxCopy | None  # None: only to be waited for
    computed: torch.cuda.Event | None  # None: on the CPU
    on_ready: Callable[[], None]


class KvOutbox:
    """take(), send(), tell(), give_back() and poll() on the engine thread. Owns its memory and a thread that
    waits for the device."""

    def __init__(self, device: KvCache, num_slots: int) -> None:
        """Exports the device's cache: from now on somebody waits until its blocks are final."""
        device.export()
        self.cache = KvCache(device.layout, num_slots, is_shared=True)  # the slots are its blocks
        self._device = device
        self._free: list[range] = [range(num_slots)]  # ascending, no two touch
        self._stream: torch.cuda.Stream | None = None
        self.is_pinned = False
        if device.data.device.type == "cuda":
            self._stream = torch.cuda.Stream(device.data.device)
            self.is_pinned = pin(self.cache.data)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None  # any thread: poll() would raise
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-outbox", daemon=True)
        self._thread.start()

    @property
    def num_free_slots(self) -> int:
        return sum(map(len, self._free))

    def take(self, num_slots: int) -> range | None:
        """A run of them, or None: there is no such run now."""
        for i, free in enumerate(self._free):
            if len(free) >= num_slots:
                taken, rest = free[:num_slots], free[num_slots:]
                self._free[i : i + 1] = [rest] if rest else []
                return taken
        return None

    def give_back(self, slots: range) -> None:
        insort(self._free, slots, key=lambda run: run.start)
        merged: list[range] = []
        for run in self._free:
            if merged and merged[-1].stop == run.start:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                merged.append(run)
        self._free = merged

    def send(
        self, copy: OutboxCopy, on_copied: Callable[[], None], computed: torch.cuda.Event | None = None
    ) -> None:
        """on_copied() on another thread, once the slots hold what the blocks hold when `computed` is
        reached, or what was launched so far is done. Copies are made one after another."""
        self._put(copy, on_copied, computed)

    def tell(self, on_computed: Callable[[], None], computed: torch.cuda.Event | None = None) -> None:
        """on_computed() on that thread and in that order, once `computed` is reached: for a reader that
        copies from the cache itself."""
        self._put(None, on_computed, computed)

    def poll(self) -> None:
        """Raises what a copy raised."""
        if self._failure is not None:
            raise RuntimeError("a copy of KV off the device failed") from self._failure

    def check_integrity(self, taken: list[range | None]) -> None:
        """AssertionError unless every slot is free or taken once."""
        every = [slot for slots in (*self._free, *filter(None, taken)) for slot in slots]
        assert sorted(every) == list(range(self.cache.num_blocks)), "slots of the outbox do not add up"

    def close(self) -> None:
        """Copies under way are finished, the others dropped. Idempotent."""
        self._is_closing = True
        self._jobs.put(None)
        self._thread.join()
        if self.is_pinned:
            unpin(self.cache.data)
            self.is_pinned = False
        self.cache.close()

    def _put(
        self, copy: OutboxCopy | None, on_ready: Callable[[], None], computed: torch.cuda.Event | None
    ) -> None:
        if self._stream is not None and computed is None:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._device.data.device))
        self._jobs.put(_Job(copy, computed, on_ready))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._failure is not None or self._is_closing:
                continue
            try:
                self._make_ready(job)
                job.on_ready()
            except BaseException as error:  # noqa: BLE001 - belongs to the engine thread
                self._failure = error
                self.on_failure()

    @torch.inference_mode()
    def _make_ready(self, job: _Job) -> None:
        if self._stream is None or job.computed is None:
            if job.copy is not None:
                self._copy_on_cpu(job.copy)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(job.computed)
            if job.copy is not None:
                layers = slice(job.copy.first_layer, job.copy.first_layer + job.copy.num_layers)
                source, target = self._device.data[layers], self.cache.data[layers]
                copy_out(source, job.copy.block_ids, target, job.copy.slots[0])
            self._stream.synchronize()

    def _copy_on_cpu(self, copy: OutboxCopy) -> None:
        payload = self._device.read_blocks(copy.first_layer, copy.num_layers, copy.block_ids)
        self.cache.write_blocks(copy.first_layer, copy.num_layers, copy.slots, payload)
