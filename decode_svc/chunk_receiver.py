"""Verifies the chunks of one hand-off and writes them into the blocks reserved for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.kv_cache import KvCache
from proto.prefill_pb2 import KvChunk, PrefillFinished
from worker.cancellation import run_in_thread
from worker.kv_carrier import KvCarrier, num_chunk_bytes
from worker.kv_chunks import INLINE_BYTES, ChunkTally

if TYPE_CHECKING:
    import torch


class ChunkReceiver:
    """Raises ValueError, saying what was expected and found, for anything but each rectangle exactly once."""

    def __init__(
        self,
        kv_cache: KvCache,
        carrier: KvCarrier,
        block_ids: list[int],
        num_held_blocks: int,
        fence: torch.cuda.Event | None = None,
    ) -> None:
        """block_ids: of the whole sequence; the leading num_held_blocks of them must not be written. fence:
        of the cache, when the blocks were given."""
        self._tally = ChunkTally()
        self._kv_cache = kv_cache
        self._carrier = carrier
        self._block_ids = block_ids
        self._fence = fence
        # [layer, block of the sequence]
        self._is_covered = np.zeros((kv_cache.layout.num_layers, len(block_ids)), dtype=bool)
        self._is_covered[:, :num_held_blocks] = True

    @property
    def num_bytes(self) -> int:
        return self._tally.num_bytes

    @property
    def is_complete(self) -> bool:
        return bool(self._is_covered.all())

    async def receive(self, chunk_pb: KvChunk, payload: memoryview) -> None:
        """Returns, or is cancelled, only when nothing writes to the blocks any more."""
        self._cover(chunk_pb)
        num_bytes = num_chunk_bytes(chunk_pb, self._kv_cache.layout)
        if num_bytes <= INLINE_BYTES and not self._kv_cache.is_on_device:
            self._write(chunk_pb, payload)
        else:
            await run_in_thread(self._write, chunk_pb, payload)
        self._tally.add(num_bytes, chunk_pb.checksum)

    def verify_finished(self, finished_pb: PrefillFinished) -> None:
        self._tally.verify(finished_pb)
        if not self.is_complete:
            num_missing = int((~self._is_covered).sum())
            raise ValueError(f"{num_missing} of {self._is_covered.size} blocks of a layer never came")

    def _cover(self, chunk_pb: KvChunk) -> None:
        num_layers, num_blocks = self._is_covered.shape
        last_layer = chunk_pb.first_layer + chunk_pb.num_layers
        last_block = chunk_pb.first_block + chunk_pb.num_blocks
        if (
            last_layer > num_layers
            or last_block > num_blocks
            or 0 in (chunk_pb.num_layers, chunk_pb.num_blocks)
        ):
            raise ValueError(
                f"chunk of layers [{chunk_pb.first_layer}, {last_layer}) and blocks "
                f"[{chunk_pb.first_block}, {last_block}) of a sequence with {num_layers} and {num_blocks}"
            )
        part = self._is_covered[chunk_pb.first_layer : last_layer, chunk_pb.first_block : last_block]
        if part.any():
            raise ValueError(
                f"layer {chunk_pb.first_layer}, block {chunk_pb.first_block}: came before or held"
            )
        part[:] = True

    def _write(self, chunk_pb: KvChunk, payload: memoryview) -> None:
        block_ids = self._block_ids[chunk_pb.first_block : chunk_pb.first_block + chunk_pb.num_blocks]
        self._carrier.write(chunk_pb, payload, self._kv_cache, block_ids, self._fence)
