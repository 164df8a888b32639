"""Verifies the chunks of one hand-off and writes them into the blocks reserved for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine

import numpy as np

from engine.kv_cache import KvCache
from proto.prefill_pb2 import KvChunk, PrefillFinished
from worker.kv_carrier import KvCarrier
from worker.prefill_frames import checksum, combined_checksum

# Copying more than this takes longer than a trip to a thread and back.
_INLINE_BYTES = 256 << 10


class ChunkReceiver:
    """Raises ValueError, saying what was expected and found, for anything but each rectangle exactly once."""

    def __init__(
        self, kv_cache: KvCache, carrier: KvCarrier, block_ids: list[int], num_held_blocks: int
    ) -> None:
        """block_ids: of the whole sequence; the leading num_held_blocks of them must not be written."""
        self.num_bytes = 0
        self._kv_cache = kv_cache
        self._carrier = carrier
        self._block_ids = block_ids
        self._checksums: list[int] = []
        # [layer, block of the sequence]
        self._is_covered = np.zeros((kv_cache.layout.num_layers, len(block_ids)), dtype=bool)
        self._is_covered[:, :num_held_blocks] = True

    async def receive(self, chunk_pb: KvChunk, payload: memoryview) -> None:
        """Returns, or is cancelled, only when nothing writes to the blocks any more."""
        self._cover(chunk_pb)
        num_bytes = self._expected_bytes(chunk_pb)
        if num_bytes <= _INLINE_BYTES:
            self._write(chunk_pb, payload)
        else:
            await _run_to_end(asyncio.to_thread(self._write, chunk_pb, payload))
        self._checksums.append(chunk_pb.checksum)
        self.num_bytes += num_bytes

    def verify_finished(self, finished_pb: PrefillFinished) -> None:
        found = (len(self._checksums), self.num_bytes)
        if found != (finished_pb.num_chunks, finished_pb.num_bytes):
            raise ValueError(
                f"expected {finished_pb.num_chunks} chunks of {finished_pb.num_bytes} bytes together, "
                f"got {found[0]} of {found[1]}"
            )
        if combined_checksum(self._checksums) != finished_pb.checksum:
            raise ValueError("the combined checksum does not match the chunks")
        if not self._is_covered.all():
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

    def _expected_bytes(self, chunk_pb: KvChunk) -> int:
        layout = self._kv_cache.layout
        return chunk_pb.num_layers * chunk_pb.num_blocks * layout.block_size * layout.token_bytes

    def _write(self, chunk_pb: KvChunk, payload: memoryview) -> None:
        kv_bytes = self._carrier.unpack(chunk_pb, payload)
        if len(kv_bytes) != self._expected_bytes(chunk_pb):
            raise ValueError(f"expected {self._expected_bytes(chunk_pb)} bytes, got {len(kv_bytes)}")
        if checksum(kv_bytes) != chunk_pb.checksum:
            raise ValueError(
                f"checksum of layer {chunk_pb.first_layer}, block {chunk_pb.first_block} does not match"
            )
        block_ids = self._block_ids[chunk_pb.first_block : chunk_pb.first_block + chunk_pb.num_blocks]
        self._kv_cache.write_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids, kv_bytes)


async def _run_to_end(work: Coroutine[object, object, None]) -> None:
    """Like awaiting it, but a cancellation waits for the work: its thread cannot be stopped half-way."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        task.exception()  # seen: the cancellation matters more
        raise
