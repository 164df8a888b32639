"""Tells KV listeners which rectangles of the cache are final, in groups of about 1 MiB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.kv_layout import KvLayout
from engine.scheduler import ScheduledBatch
from engine.sequence import KvListener, Sequence

GROUP_BYTES = 1 << 20


@dataclass(slots=True)
class _Chunk:
    """Blocks of one listening sequence that this step completes."""

    listener: KvListener
    first_block: int
    block_ids: list[int]
    layers_per_group: int
    num_announced_layers: int = 0


class KvAnnouncer:
    def __init__(self, layout: KvLayout, group_bytes: int = GROUP_BYTES) -> None:
        self._num_layers = layout.num_layers
        self._block_size = layout.block_size
        self._layer_block_bytes = layout.block_size * layout.token_bytes
        self._group_bytes = group_bytes

    def announce_start(self, seq: Sequence) -> None:
        """First scheduled: the cached prefix is there, in all layers."""
        listener = seq.kv_listener
        if listener is None:
            return
        assert seq.times.scheduled is not None
        listener.started(len(seq.block_table), seq.num_hit_tokens, seq.times.scheduled - seq.times.added)
        self.announce_blocks(seq, 0, seq.num_hit_tokens // self._block_size)

    def announce_blocks(self, seq: Sequence, first_block: int, end_block: int) -> None:
        """These blocks are there, in all layers."""
        if seq.kv_listener is not None and first_block < end_block:
            chunk = self._chunk(seq.kv_listener, first_block, seq.block_table[first_block:end_block])
            for layer in range(self._num_layers):
                self._layer_done(chunk, layer)

    def layer_done(self, batch: ScheduledBatch) -> Callable[[int], None] | None:
        """For the forward pass of the batch; None when nobody listens. Call before Scheduler.advance()."""
        size = self._block_size
        chunks = []
        for seq, num_tokens in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
            if seq.kv_listener is not None:
                first = seq.num_computed_tokens // size
                end = -(-(seq.num_computed_tokens + num_tokens) // size)
                chunks.append(self._chunk(seq.kv_listener, first, seq.block_table[first:end]))
        if not chunks:
            return None

        def announce(layer: int) -> None:
            for chunk in chunks:
                self._layer_done(chunk, layer)

        return announce

    def _chunk(self, listener: KvListener, first_block: int, block_ids: list[int]) -> _Chunk:
        layer_bytes = len(block_ids) * self._layer_block_bytes
        return _Chunk(listener, first_block, block_ids, max(1, self._group_bytes // layer_bytes))

    def _layer_done(self, chunk: _Chunk, layer: int) -> None:
        first_layer = chunk.num_announced_layers
        num_layers = layer + 1 - first_layer
        if num_layers < chunk.layers_per_group and layer + 1 < self._num_layers:
            return
        chunk.num_announced_layers = layer + 1
        # One layer of a long prefix may be more than a group: then it goes block range by block range.
        stride = max(1, self._group_bytes // (num_layers * self._layer_block_bytes))
        for start in range(0, len(chunk.block_ids), stride):
            ids = chunk.block_ids[start : start + stride]
            chunk.listener.kv_ready(first_layer, num_layers, chunk.first_block + start, ids)
