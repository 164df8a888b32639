"""One Fetch call on the worker that holds the blocks.

1. Pinned: the longest leading run of the wanted blocks that is here, in any tier. From now on none of them
   is evicted or reused.
2. STARTED goes out, then whole blocks, the last ones first, about 1 MiB a message, each read when the stream
   has room for it.
3. FINISHED, or the reader has ended the call because its compute met what came.

Whatever ends the call, the run is unpinned, and nothing reads it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc.aio

from engine.engine import Engine
from engine.kv_layout import KvLayout
from engine.pins import PinnedRun
from kvstore.block_hash import BlockHash
from proto.kv_pb2 import FetchFinished, FetchRequest, FetchStarted
from worker.async_engine import AsyncEngine
from worker.cancellation import run_in_thread
from worker.kv_carrier import BytesCarrier, PackedChunk, SharedMemoryCarrier, pack_bytes, shared_cache_pb
from worker.kv_chunks import ChunkTally
from worker.kv_frames import FrameKind, pack_frame
from worker.kv_rectangle import TARGET_CHUNK_BYTES, KvRectangle

STALL_S = 20.0  # for the reader to make room for one message; a reader that hangs must not hold blocks


ServicerContext = grpc.aio.ServicerContext[bytes, bytes]


class FetchCall:
    def __init__(
        self, engine: AsyncEngine, worker_id: str, carrier: BytesCarrier, request_pb: FetchRequest
    ) -> None:
        self.carrier_name = carrier.name
        self.num_blocks = 0  # that will come
        self.tally = ChunkTally()
        self._engine = engine
        self._worker_id = worker_id
        self._carrier = carrier
        self._request_pb = request_pb
        self._run: PinnedRun | None = None

    async def run(
        self,
        context: ServicerContext,
        hashes: list[BlockHash],
        stall_s: float = STALL_S,
    ) -> None:
        """`hashes` of the wanted blocks. Raises TimeoutError when the reader takes nothing for stall_s, and
        ValueError when a block is not what it was."""
        try:
            run = await self._engine.call(lambda engine: self._pin(engine, hashes))
            self.num_blocks = run.num_blocks
            await _write(context, self._pack_started(), stall_s)
            for start, stop in _ranges(run.num_blocks, self._engine.engine.kv_layout):
                for packed in await run_in_thread(self._pack, run, start, stop):
                    await _write(context, packed.frame, stall_s)
                    self.tally.add(packed.num_bytes, packed.checksum)
            await _write(context, self._pack_finished(), stall_s)
        finally:
            # After _pin, if that runs at all: even when the call was cancelled in between.
            self._engine.post(self._unpin)

    def _pin(self, engine: Engine, hashes: list[BlockHash]) -> PinnedRun:
        self._run = run = engine.pin(hashes)
        return run

    def _unpin(self, engine: Engine) -> None:
        if self._run is not None:
            engine.unpin(self._run.pin_id)

    def _pack(self, run: PinnedRun, start: int, stop: int) -> list[PackedChunk]:
        """Blocks [start, stop) of the run, whole; one that is larger than a message in groups of layers."""
        layout = self._engine.engine.kv_layout
        first_block = self._request_pb.first_block + start
        block_ids = run.is_on_device(start, stop)
        if block_ids is not None:
            whole = KvRectangle(0, layout.num_layers, first_block, tuple(block_ids))
            return [self._carrier.pack(piece) for piece in whole.pieces(layout)]
        carrier = self._carrier
        if isinstance(carrier, SharedMemoryCarrier) and carrier.shares_host_memory:
            slots = run.host_slots(start, stop)
            if slots is not None:
                whole = KvRectangle(0, layout.num_layers, first_block, tuple(slots))
                return [carrier.pack_host(piece) for piece in whole.pieces(layout)]
        kv_bytes = run.read_blocks(start, stop)
        # What is not on the device has no block ids.
        whole = KvRectangle(0, layout.num_layers, first_block, (0,) * (stop - start))
        chunks, offset = [], 0
        for piece in whole.pieces(layout):
            size = piece.num_bytes(layout)
            chunks.append(pack_bytes(piece, kv_bytes[offset : offset + size]))
            offset += size
        return chunks

    def _pack_started(self) -> bytes:
        started_pb = FetchStarted(worker_id=self._worker_id, num_blocks=self.num_blocks)
        if isinstance(self._carrier, SharedMemoryCarrier):
            started_pb.shared_kv_cache.CopyFrom(shared_cache_pb(self._engine.engine.kv_cache))
            host_cache = self._engine.engine.host_cache
            if self._carrier.shares_host_memory and host_cache is not None:
                started_pb.shared_host_cache.CopyFrom(shared_cache_pb(host_cache))
        return pack_frame(FrameKind.FETCH_STARTED, started_pb)

    def _pack_finished(self) -> bytes:
        finished_pb = FetchFinished(
            num_chunks=self.tally.num_chunks, num_bytes=self.tally.num_bytes, checksum=self.tally.checksum
        )
        return pack_frame(FrameKind.FETCH_FINISHED, finished_pb)


async def _write(context: ServicerContext, frame: bytes, stall_s: float) -> None:
    async with asyncio.timeout(stall_s):
        await context.write(frame)


def _ranges(num_blocks: int, layout: KvLayout) -> Iterator[tuple[int, int]]:
    """Blocks [start, stop) of one message, or of several when one block is larger; the last ones first."""
    stride = max(1, TARGET_CHUNK_BYTES // layout.block_bytes)
    for stop in range(num_blocks, 0, -stride):
        yield max(0, stop - stride), stop
