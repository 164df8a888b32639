"""Tells KV listeners which rectangles of the cache are final, in groups of about 1 MiB.

With an outbox the cache is on a device, whose forward pass has only been launched when a layer is reported:
rectangles are copied to the outbox behind it and announced there, on another thread, in larger groups, since
each costs a copy. A listener whose reader copies from the device itself hears of the blocks there instead,
when the forward pass has got so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from engine.kv_cache import KvCache
from engine.kv_outbox import KvOutbox, OutboxCopy
from engine.models.causal_lm import LayerDone
from engine.scheduler import ScheduledBatch
from engine.sequence import KvListener, Sequence

if TYPE_CHECKING:
    import torch

GROUP_BYTES = 1 << 20
OUTBOX_GROUP_BYTES = 8 << 20


@runtime_checkable
class DeviceListener(Protocol):
    """A KvListener that can say so."""

    @property
    def reads_device(self) -> bool:
        """Its reader copies from the cache itself, wherever that is."""
        ...


@dataclass(slots=True)
class _Chunk:
    """Blocks of one listening sequence that this step completes."""

    listener: KvListener
    first_block: int
    block_ids: list[int]
    slots: range | None  # of these blocks in the outbox
    reads_device: bool
    layers_per_group: int
    num_announced_layers: int = 0


class KvAnnouncer:
    def __init__(
        self, kv_cache: KvCache, outbox: KvOutbox | None = None, group_bytes: int | None = None
    ) -> None:
        """Does not own the outbox."""
        layout = kv_cache.layout
        self._kv_cache = kv_cache
        self._outbox = outbox
        self._num_layers = layout.num_layers
        self._block_size = layout.block_size
        self._layer_block_bytes = layout.block_size * layout.token_bytes
        self._group_bytes = group_bytes or (GROUP_BYTES if outbox is None else OUTBOX_GROUP_BYTES)

    def announce_start(self, seq: Sequence) -> None:
        """First scheduled: the cached prefix is there, in all layers. Without room in the outbox the
        listener gets blocks of the cache itself."""
        listener = seq.kv_listener
        if listener is None:
            return
        assert seq.times.scheduled is not None
        origin = self._kv_cache
        if self._outbox is not None and not _reads_device(listener):
            seq.outbox_slots = self._outbox.take(len(seq.block_table))
            if seq.outbox_slots is not None:
                origin = self._outbox.cache
        queue_s = seq.times.scheduled - seq.times.added
        listener.started(len(seq.block_table), seq.num_hit_tokens, queue_s, origin)
        self.announce_blocks(seq, 0, seq.num_hit_tokens // self._block_size)

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended, or was aborted: nobody reads its slots any more."""
        if seq.outbox_slots is not None and self._outbox is not None:
            self._outbox.give_back(seq.outbox_slots)
            seq.outbox_slots = None

    def announce_blocks(self, seq: Sequence, first_block: int, end_block: int) -> None:
        """These blocks are there, in all layers."""
        if seq.kv_listener is not None and first_block < end_block:
            chunk = self._chunk(seq, seq.kv_listener, first_block, end_block)
            for layer in range(self._num_layers):
                self._layer_done(chunk, layer, None)

    def layer_done(self, batch: ScheduledBatch) -> LayerDone | None:
        """For the forward pass of the batch; None when nobody listens. Call before Scheduler.advance()."""
        size = self._block_size
        chunks = []
        for seq, num_tokens in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
            if seq.kv_listener is not None:
                first = seq.num_computed_tokens // size
                end = -(-(seq.num_computed_tokens + num_tokens) // size)
                chunks.append(self._chunk(seq, seq.kv_listener, first, end))
        if not chunks:
            return None

        def announce(layer: int, computed: torch.cuda.Event | None = None) -> None:
            for chunk in chunks:
                self._layer_done(chunk, layer, computed)

        return announce

    def _chunk(self, seq: Sequence, listener: KvListener, first_block: int, end_block: int) -> _Chunk:
        block_ids = seq.block_table[first_block:end_block]
        slots = None if seq.outbox_slots is None else seq.outbox_slots[first_block:end_block]
        layer_bytes = len(block_ids) * self._layer_block_bytes
        layers_per_group = max(1, self._group_bytes // layer_bytes)
        return _Chunk(listener, first_block, block_ids, slots, _reads_device(listener), layers_per_group)

    def _layer_done(self, chunk: _Chunk, layer: int, computed: torch.cuda.Event | None) -> None:
        first_layer = chunk.num_announced_layers
        num_layers = layer + 1 - first_layer
        if num_layers < chunk.layers_per_group and layer + 1 < self._num_layers:
            return
        chunk.num_announced_layers = layer + 1
        # One layer of a long prefix may be more than a group: then it goes block range by block range.
        stride = max(1, self._group_bytes // (num_layers * self._layer_block_bytes))
        for start in range(0, len(chunk.block_ids), stride):
            part = slice(start, start + stride)
            ids, first_block = chunk.block_ids[part], chunk.first_block + start
            slots = ids if chunk.slots is None else list(chunk.slots[part])
            ready = partial(chunk.listener.kv_ready, first_layer, num_layers, first_block, slots)
            if self._outbox is not None and chunk.slots is not None:
                self._outbox.send(OutboxCopy(first_layer, num_layers, ids, slots), ready, computed)
            elif self._outbox is not None and chunk.reads_device:
                self._outbox.tell(ready, computed)
            else:
                ready()


def _reads_device(listener: KvListener) -> bool:
    return isinstance(listener, DeviceListener) and listener.reads_device
