"""One Prefill call, from its request to its end.

1. Queued: the sequence is in the engine, which has not scheduled it.
2. Started: all its blocks are allocated; STARTED goes out.
3. Computing: the engine announces rectangles of the cache as they become final. Only these announcements are
   queued; bytes are read when the stream has room for them, so a slow receiver holds blocks and no copies.
4. Finished: counts, checksum and the first token go out.
5. Committed, or the call ended: the blocks become ordinary prefix cache.

A call that ends before 4 aborts its sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from engine.outputs import SequenceOutput
from prefill_svc.prefill_trace import PrefillTrace
from proto.prefill_pb2 import PrefillFinished, PrefillRequest, PrefillStarted, SharedKvCache
from servicekit.logging import get_logger
from worker.async_engine import AsyncEngine
from worker.conversions import all_logprobs_to_pb, logprobs_to_pb
from worker.kv_carrier import KvCarrier, SharedMemoryCarrier, StreamCarrier
from worker.kv_rectangle import TARGET_CHUNK_BYTES, KvRectangle
from worker.prefill_frames import FrameKind, combined_checksum, pack_frame, read_frame, read_header
from worker.sequence_spec import add_sequence, prefill_sequence

log = get_logger(__name__)

ServicerContext = grpc.aio.ServicerContext


@dataclass(frozen=True, slots=True)
class Started:
    num_blocks: int
    num_hit_tokens: int
    queue_s: float


PrefillEvent = Started | KvRectangle | SequenceOutput


class PrefillEvents:
    """What the engine says about one sequence, in order. The KvListener methods come on the engine thread."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[PrefillEvent] = asyncio.Queue()

    def started(self, num_blocks: int, num_hit_tokens: int, queue_s: float) -> None:
        self._engine.in_loop(self._queue.put_nowait, Started(num_blocks, num_hit_tokens, queue_s))

    def kv_ready(self, first_layer: int, num_layers: int, first_block: int, block_ids: list[int]) -> None:
        rectangle = KvRectangle(first_layer, num_layers, first_block, tuple(block_ids))
        self._engine.in_loop(self._queue.put_nowait, rectangle)

    def output(self, output: SequenceOutput) -> None:
        self._queue.put_nowait(output)

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()

    async def next(self) -> PrefillEvent:
        return await self._queue.get()


class PrefillCall:
    def __init__(
        self,
        engine: AsyncEngine,
        worker_id: str,
        shares_memory: bool,
        request_pb: PrefillRequest,
        trace: PrefillTrace,
    ) -> None:
        """shares_memory: the receiver can and wants to read this worker's cache by itself."""
        self.started: Started | None = None
        self.finished: SequenceOutput | None = None
        self.num_bytes = 0
        self._engine = engine
        self._trace = trace
        self._worker_id = worker_id
        self._request_pb = request_pb
        self._kv_cache = engine.engine.kv_cache
        self.is_shared = shares_memory and self._kv_cache.shared_name is not None
        self._carrier: KvCarrier = (
            SharedMemoryCarrier(self._kv_cache) if self.is_shared else StreamCarrier(self._kv_cache)
        )
        self._checksums: list[int] = []
        self._pending: KvRectangle | None = None
        self._events = PrefillEvents(engine)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request_pb.sequence.prompt_ids)

    async def run(self, context: ServicerContext[Any, Any]) -> bool:
        """Whether the receiver committed. Raises InvalidRequest; whatever it raises, nothing stays behind."""
        seq = prefill_sequence(self._request_pb.sequence, self._engine.next_seq_id(), self._events)
        self._engine.attach(seq.seq_id, self._events.output)
        try:
            await self._engine.call(lambda engine: add_sequence(engine, seq))
            while self.finished is None:
                for frame in self._frames(await self._events.next()):
                    await context.write(frame)
            return await _read_commit(context)
        finally:
            self._engine.detach(seq.seq_id)
            if self.finished is not None:
                self._engine.post(lambda engine: engine.release(seq.seq_id))
            else:
                self._engine.post(lambda engine: engine.abort(seq.seq_id))

    def _frames(self, event: PrefillEvent) -> Iterator[bytes]:
        """Each chunk's bytes are read when its frame is asked for."""
        if isinstance(event, Started):
            self._on_started(event)
            yield self._pack_started(event)
        elif isinstance(event, KvRectangle):
            rectangle = event.without_leading(self._request_pb.num_held_blocks)
            if rectangle is not None:
                yield from self._join(rectangle)
        else:
            self.finished = event
        # Small neighbours share a message, but nothing waits for a neighbour that is not there yet.
        if self._pending is not None and (self.finished or self._events.is_empty):
            yield from self._flush()
        if self.finished is not None:
            yield self._pack_finished(self.finished)
            self._trace.finished(self.num_prompt_tokens, self.num_bytes)

    def _on_started(self, started: Started) -> None:
        self.started = started
        self._trace.started(started.num_blocks, started.num_hit_tokens)
        log.info(
            "prefill_started",
            request_id=self._request_pb.sequence.request_id,
            num_blocks=started.num_blocks,
            num_hit_tokens=started.num_hit_tokens,
            queue_s=started.queue_s,
        )

    def _join(self, rectangle: KvRectangle) -> Iterator[bytes]:
        joined = self._pending.joined(rectangle) if self._pending else rectangle
        if joined is None:
            yield from self._flush()
            joined = rectangle
        self._pending = joined
        if joined.num_bytes(self._kv_cache.layout) >= TARGET_CHUNK_BYTES:
            yield from self._flush()

    def _flush(self) -> Iterator[bytes]:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        for piece in pending.pieces(self._kv_cache.layout):
            yield self._pack_chunk(piece)

    def _pack_started(self, started: Started) -> bytes:
        started_pb = PrefillStarted(
            worker_id=self._worker_id,
            num_blocks=started.num_blocks,
            num_hit_tokens=started.num_hit_tokens,
            queue_s=started.queue_s,
        )
        if self.is_shared:
            size_bytes = self._kv_cache.num_blocks * self._kv_cache.layout.block_bytes
            started_pb.shared_kv_cache.CopyFrom(
                SharedKvCache(
                    name=self._kv_cache.shared_name,
                    size_bytes=size_bytes,
                    num_blocks=self._kv_cache.num_blocks,
                )
            )
        return pack_frame(FrameKind.PREFILL_STARTED, started_pb)

    def _pack_chunk(self, piece: KvRectangle) -> bytes:
        packed = self._carrier.pack(piece)
        self.num_bytes += packed.num_bytes
        self._checksums.append(packed.checksum)
        self._trace.chunk(piece.num_layers, len(piece.block_ids), packed.num_bytes)
        return packed.frame

    def _pack_finished(self, output: SequenceOutput) -> bytes:
        finished_pb = PrefillFinished(
            num_chunks=len(self._checksums),
            num_bytes=self.num_bytes,
            checksum=combined_checksum(self._checksums),
            first_token_id=output.token_ids[0],
            first_token_logprobs=logprobs_to_pb(output.logprobs[0]) if output.logprobs else None,
            prompt_logprobs=all_logprobs_to_pb(output.prompt_logprobs),
            prefill_s=output.prefill_s,
        )
        return pack_frame(FrameKind.PREFILL_FINISHED, finished_pb)


async def read_request(context: ServicerContext[Any, Any]) -> PrefillRequest:
    """ValueError when the call does not begin with a PREFILL_REQUEST."""
    raw = await context.read()
    if not isinstance(raw, bytes):
        raise ValueError("the call ended before its PREFILL_REQUEST")
    return read_header(read_frame(raw), FrameKind.PREFILL_REQUEST, PrefillRequest)


async def _read_commit(context: ServicerContext[Any, Any]) -> bool:
    raw = await context.read()
    return isinstance(raw, bytes) and read_frame(raw).kind == FrameKind.PREFILL_COMMITTED
