"""One Prefill call, from its request to its end.

1. Queued: the sequence is in the engine, which has not scheduled it.
2. Started: all its blocks are allocated; STARTED goes out.
3. Computing: the engine announces rectangles of the cache as they become final. Only these announcements are
   queued; bytes are read when the stream has room for them, so a slow receiver holds blocks and no copies.
   On a device they are copies in host memory already (engine.kv_outbox), or the receiver copies them off it
   by itself.
4. Finished: counts, checksum and the first token go out, once all rectangles have: copies off a device may
   end after the step that gave the token.
5. Committed, or the call ended: the blocks become ordinary prefix cache.

A call that ends before 4 aborts its sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from engine.kv_cache import KvCache
from engine.kv_load import KvSource
from engine.outputs import SequenceOutput
from prefill_svc.prefill_trace import PrefillTrace
from proto.prefill_pb2 import PrefillFinished, PrefillRequest, PrefillStarted
from servicekit.errors import InvalidRequest
from servicekit.logging import get_logger
from worker.async_engine import AsyncEngine
from worker.cancellation import run_in_thread
from worker.conversions import all_logprobs_to_pb, draft_to_pb, logprobs_to_pb
from worker.kv_carrier import KvCarrier, MappedCacheCarrier, SharedMemoryCarrier, shared_cache_pb
from worker.kv_chunks import ChunkTally
from worker.kv_frames import FrameKind, pack_frame, read_frame
from worker.kv_rectangle import TARGET_CHUNK_BYTES, KvRectangle
from worker.sequence_spec import add_sequence, prefill_sequence
from worker.transfers import TransferEnvironment

log = get_logger(__name__)

ServicerContext = grpc.aio.ServicerContext


@dataclass(frozen=True, slots=True)
class Started:
    num_blocks: int
    num_hit_tokens: int
    queue_s: float
    origin: KvCache


PrefillEvent = Started | KvRectangle | SequenceOutput


class PrefillEvents:
    """What the engine says about one sequence, in order. The KvListener methods come on threads of the
    engine."""

    def __init__(self, engine: AsyncEngine, *, reads_device: bool = False) -> None:
        self.reads_device = reads_device
        self._engine = engine
        self._queue: asyncio.Queue[PrefillEvent] = asyncio.Queue()

    def started(self, num_blocks: int, num_hit_tokens: int, queue_s: float, origin: KvCache) -> None:
        self._engine.in_loop(self._queue.put_nowait, Started(num_blocks, num_hit_tokens, queue_s, origin))

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
        transfers: TransferEnvironment,
        worker_id: str,
        request_pb: PrefillRequest,
        trace: PrefillTrace,
    ) -> None:
        self.started: Started | None = None
        self.finished: SequenceOutput | None = None
        self._transfers = transfers
        self._engine = engine = transfers.engine
        self._trace = trace
        self._worker_id = worker_id
        self._request_pb = request_pb
        self._layout = engine.engine.kv_layout
        self._carrier: KvCarrier | None = None  # once it has started
        self._num_missing = 0  # blocks of a layer that were not announced yet
        self._output: SequenceOutput | None = None
        self._tally = ChunkTally()
        self._pending: KvRectangle | None = None
        self._offer_pb = transfers.device_offer(request_pb)
        is_mapped = self._offer_pb is not None and self._offer_pb.name == request_pb.mapped_cache
        self._events = PrefillEvents(engine, reads_device=is_mapped)

    @property
    def carrier_name(self) -> str | None:
        """None before it has started."""
        return None if self._carrier is None else self._carrier.name

    @property
    def num_bytes(self) -> int:
        return self._tally.num_bytes

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request_pb.sequence.prompt_ids)

    async def run(self, context: ServicerContext[Any, Any], source: KvSource | None) -> bool:
        """Whether the receiver committed. Raises InvalidRequest; whatever it raises, nothing stays behind."""
        seq = await prefill_sequence(self._engine, self._request_pb.sequence, self._events, source)
        self._engine.attach(seq.seq_id, self._events.output)
        try:
            await self._engine.call(lambda engine: add_sequence(engine, seq))
            while self.finished is None:
                frames = self._frames(await self._events.next())
                while (frame := await self._next_frame(frames)) is not None:
                    await context.write(frame)
            return await _read_commit(context)
        finally:
            self._engine.detach(seq.seq_id)
            if self.finished is not None:
                self._engine.post(lambda engine: engine.release(seq.seq_id))
            else:
                self._engine.post(lambda engine: engine.abort(seq.seq_id))

    async def _next_frame(self, frames: Iterator[bytes]) -> bytes | None:
        if self._waits_for_device:
            return await run_in_thread(next, frames, None)
        return next(frames, None)

    @property
    def _waits_for_device(self) -> bool:
        """The outbox had no room: chunks are read off the device itself, behind forward passes."""
        return self.started is not None and self.started.origin.is_on_device and not self._events.reads_device

    def _frames(self, event: PrefillEvent) -> Iterator[bytes]:
        """Each chunk's bytes are read when its frame is asked for."""
        if isinstance(event, Started):
            self._on_started(event)
            yield self._pack_started(event)
        elif isinstance(event, KvRectangle):
            rectangle = event.without_leading(self._request_pb.num_held_blocks)
            if rectangle is not None:
                self._num_missing -= rectangle.num_layers * rectangle.num_blocks
                yield from self._join(rectangle)
        else:
            self._output = event
            if event.error is not None:
                raise InvalidRequest(event.error)
        if self._num_missing == 0:
            self.finished = self._output
        # Small neighbours share a message, but nothing waits for a neighbour that is not there yet.
        if self._pending is not None and (self.finished or self._events.is_empty):
            yield from self._flush()
        if self.finished is not None:
            # Before the decode worker can know: what it does with the first token is no longer prefilling.
            self._trace.finished(self.num_prompt_tokens, self.num_bytes)
            yield self._pack_finished(self.finished)

    def _on_started(self, started: Started) -> None:
        self.started = started
        if self._events.reads_device:
            self._carrier = MappedCacheCarrier(started.origin)
        else:
            self._carrier = self._transfers.sending_carrier(self._request_pb, started.origin)
        num_wanted = max(0, started.num_blocks - self._request_pb.num_held_blocks)
        self._num_missing = self._layout.num_layers * num_wanted
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
        if joined.num_bytes(self._layout) >= TARGET_CHUNK_BYTES:
            yield from self._flush()

    def _flush(self) -> Iterator[bytes]:
        assert self._pending is not None and self._carrier is not None
        pending, self._pending = self._pending, None
        for piece in pending.pieces(self._layout, self._carrier.max_chunk_bytes):
            yield self._pack_chunk(self._carrier, piece)

    def _pack_started(self, started: Started) -> bytes:
        started_pb = PrefillStarted(
            worker_id=self._worker_id,
            num_blocks=started.num_blocks,
            num_hit_tokens=started.num_hit_tokens,
            queue_s=started.queue_s,
        )
        if isinstance(self._carrier, SharedMemoryCarrier):
            started_pb.shared_kv_cache.CopyFrom(shared_cache_pb(started.origin))
        if self._events.reads_device:
            started_pb.is_in_mapped_cache = True
        elif self._offer_pb is not None:
            started_pb.device_kv_cache.CopyFrom(self._offer_pb)
        return pack_frame(FrameKind.PREFILL_STARTED, started_pb)

    def _pack_chunk(self, carrier: KvCarrier, piece: KvRectangle) -> bytes:
        packed = carrier.pack(piece)
        self._tally.add(packed.num_bytes, packed.checksum)
        self._trace.chunk(piece.num_layers, len(piece.block_ids), packed.num_bytes)
        return packed.frame

    def _pack_finished(self, output: SequenceOutput) -> bytes:
        finished_pb = PrefillFinished(
            num_chunks=self._tally.num_chunks,
            num_bytes=self._tally.num_bytes,
            checksum=self._tally.checksum,
            first_token_id=output.token_ids[0],
            first_token_logprobs=logprobs_to_pb(output.logprobs[0]) if output.logprobs else None,
            prompt_logprobs=all_logprobs_to_pb(output.prompt_logprobs),
            prefill_s=output.prefill_s,
            num_loaded_tokens=output.num_loaded_tokens,
            num_fetched_tokens=output.num_fetched_tokens,
            load_s=output.load_s,
            draft=None if output.draft is None else draft_to_pb(output.draft),
        )
        return pack_frame(FrameKind.PREFILL_FINISHED, finished_pb)


async def _read_commit(context: ServicerContext[Any, Any]) -> bool:
    raw = await context.read()
    return isinstance(raw, bytes) and read_frame(raw).kind == FrameKind.PREFILL_COMMITTED
