"""One hand-off, led by the decode worker.

1. RESERVED: the engine holds the cached prefix for the sequence; Prefill is open and its request queued
   there. No other block is promised yet.
2. TRANSFERRING: the prefill worker has started; blocks are extended to the whole prompt, chunks are verified
   and written into them.
3. COMMITTED: everything arrived and was verified; the sequence joins the running batch. Or ABORTED, from 1
   or 2. Bytes without checksums are right if the prefill worker still held their blocks after the last copy:
   it is told of the commit when all are copied, and must end the call well before there is one.

The caller owns the sequence: whatever `run` raises, the caller aborts it in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import grpc
import grpc.aio

from decode_svc.chunk_receiver import ChunkReceiver
from engine.engine import Engine
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.sequence import Sequence
from engine.speculation.handed_draft import HandedDraft
from proto import common_pb2
from proto.link_pb2 import RequestTimings, Submit
from proto.prefill_pb2 import KvChunk, PrefillCommitted, PrefillFinished, PrefillRequest, PrefillStarted
from servicekit.errors import HandoffFailed
from servicekit.frames import Frame
from servicekit.logging import get_logger
from servicekit.rpc import error_from_rpc
from worker.cancellation import check_cancelled
from worker.conversions import draft_from_pb, layout_to_pb, logprobs_from_pb
from worker.deadline import Deadline
from worker.device_mappings import MappedCache
from worker.kv_carrier import KvCarrier
from worker.kv_frames import (
    PREFILL_METHOD,
    PREFILL_SERVICE,
    FrameCall,
    FrameKind,
    next_frame,
    open_call,
    pack_frame,
    read_header,
)
from worker.sequence_spec import num_prompt_blocks, reserve_sequence
from worker.transfers import TransferEnvironment

if TYPE_CHECKING:
    import torch

_CLOSE_S = 2.0  # for the prefill worker to see the commit before the call is cancelled

log = get_logger(__name__)


class HandoffState(enum.Enum):
    RESERVED = "RESERVED"
    TRANSFERRING = "TRANSFERRING"
    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """What arrived with the KV."""

    logprobs: TokenLogprobs
    prompt_logprobs_pb: list[common_pb2.TokenLogprobs]
    timings_pb: RequestTimings
    is_last: bool  # no KV came with it, nothing was committed
    draft: HandedDraft | None = None


class _Granted(NamedTuple):
    """Blocks of the whole sequence."""

    block_ids: list[int]
    fence: torch.cuda.Event | None  # what comes from outside is written behind it


OnCommit = Callable[[FirstToken, SequenceOutput | None], None]


class Handoff:
    def __init__(
        self,
        environment: TransferEnvironment,
        seq: Sequence,
        submit_pb: Submit,
        deadline: Deadline,
    ) -> None:
        self.state = HandoffState.RESERVED
        self.num_bytes = 0
        self.transfer_s = 0.0  # first chunk -> last one; 0 when there is none
        self.carrier_name = "stream"
        self._environment = environment
        self._engine = environment.engine
        self._seq = seq
        self._submit_pb = submit_pb
        self._spec_pb = spec_pb = submit_pb.sequence
        self._address = submit_pb.prefill_address
        self._deadline = deadline
        self._block_size = self._engine.engine.kv_layout.block_size
        self._num_blocks = num_prompt_blocks(spec_pb, self._block_size)
        self._num_held_blocks = 0
        self._arrivals: list[tuple[float, int]] = []  # when, and how many bytes had come by then
        self._accepts_shared_memory = environment.accepts_shared_memory_of(self._address)
        self._mapped: MappedCache | None = None
        self._clock = asyncio.get_running_loop().time

    @property
    def needs_no_kv(self) -> bool:
        """The first token is the last: no block is reserved, sent or committed."""
        return self._seq.sampling.max_tokens - len(self._spec_pb.output_ids) == 1

    async def run(self, on_commit: OnCommit) -> None:
        """on_commit is called in the loop, before any later output of the sequence.

        Raises ServingError: InvalidRequest is the caller's fault, everything else the prefill worker's."""
        try:
            if self.needs_no_kv:
                self._num_held_blocks = self._num_blocks
            else:
                self._num_held_blocks = await self._engine.call(lambda e: reserve_sequence(e, self._seq))
            with self._environment.device_mappings.mapped(self._address) as self._mapped:
                async with self._environment.channels.channel(self._address) as channel:
                    await self._call(channel, on_commit)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=f"prefill worker {self._address}") from error
        except ValueError as error:
            raise HandoffFailed(f"prefill worker {self._address}: {error}", state=self.state.value) from error
        finally:
            if self.state is not HandoffState.COMMITTED:
                self.state = HandoffState.ABORTED

    async def _call(self, channel: grpc.aio.Channel, on_commit: OnCommit) -> None:
        call = open_call(channel, PREFILL_SERVICE, PREFILL_METHOD)
        try:
            await call.write(self._request_frame())
            started_pb = read_header(await _next(call), FrameKind.PREFILL_STARTED, PrefillStarted)
            started_at = self._clock()
            self.state = HandoffState.TRANSFERRING
            with self._traced():
                with self._environment.handoff_carrier(
                    started_pb,
                    self._address,
                    self._mapped,
                    is_shared_accepted=self._accepts_shared_memory,
                ) as carrier:
                    self.carrier_name = carrier.name
                    finished_pb = await self._transfer(call, started_pb, carrier)
                finished_at = self._clock()
                is_checked = carrier.has_checksums or self.num_bytes == 0
                if not is_checked:
                    await self._check_ended_well(call)
                # STARTED took a while to get here, so this is early; but never before the token arrived.
                sampled_at = min(finished_at, started_at + finished_pb.prefill_s)
                # Before the commit: that waits for the engine's present step and tells nothing of the way.
                self._tell_rate(sampled_at)
                await self._commit(self._first_token(started_pb, finished_pb), sampled_at, on_commit)
            if is_checked:
                await _tell_committed(call)
        finally:
            call.cancel()

    @contextmanager
    def _traced(self) -> Iterator[None]:
        """The span `transfer`: started -> committed."""
        span = self._environment.tracer.start("transfer", self._spec_pb.traceparent)
        try:
            yield
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            span.set(
                {
                    "baton.num_blocks": self._num_blocks,
                    "baton.num_held_blocks": self._num_held_blocks,
                    "baton.transfer_bytes": self.num_bytes,
                    "baton.transfer_s": self.transfer_s,
                    "baton.carrier": self.carrier_name,
                }
            )
            span.end()

    def _request_frame(self) -> bytes:
        environment = self._environment
        request_pb = PrefillRequest(
            sequence=self._spec_pb,
            kv_layout=layout_to_pb(self._engine.engine.kv_layout),
            num_held_blocks=self._num_held_blocks,
            host_id=environment.host_id,
            accepts_shared_memory=self._accepts_shared_memory,
            accepts_device_memory=environment.accepts_device_memory,
            mapped_cache="" if self._mapped is None else self._mapped.name,
        )
        request_pb.sequence.time_left_s = self._deadline.time_left_s
        if self._submit_pb.HasField("peer"):
            request_pb.peer.CopyFrom(self._submit_pb.peer)
        return pack_frame(FrameKind.PREFILL_REQUEST, request_pb)

    async def _transfer(
        self, call: FrameCall, started_pb: PrefillStarted, carrier: KvCarrier
    ) -> PrefillFinished:
        if started_pb.num_blocks != self._num_blocks:
            raise ValueError(f"expected {self._num_blocks} blocks, it computes {started_pb.num_blocks}")
        granted = _Granted([], None) if self.needs_no_kv else await self._extend()
        block_ids = granted.block_ids[: self._num_blocks]
        receiver = ChunkReceiver(
            self._engine.engine.kv_cache, carrier, block_ids, self._num_held_blocks, granted.fence
        )
        first_chunk_at: float | None = None
        try:
            while (frame := await _next(call)).kind == FrameKind.KV_CHUNK:
                first_chunk_at = first_chunk_at or self._clock()
                await receiver.receive(read_header(frame, FrameKind.KV_CHUNK, KvChunk), frame.payload)
                now = self._clock()
                self.transfer_s = now - first_chunk_at
                self._arrivals.append((now, receiver.num_bytes))
                if receiver.is_complete and not carrier.has_checksums:
                    # Now, so that the end of the call follows FINISHED at once.
                    await _say_committed(call)
        finally:
            self.num_bytes = receiver.num_bytes
        finished_pb = read_header(frame, FrameKind.PREFILL_FINISHED, PrefillFinished)
        receiver.verify_finished(finished_pb)
        return finished_pb

    async def _extend(self) -> _Granted:
        """Waits for room, in the engine's queue."""
        blocks: asyncio.Future[_Granted] = asyncio.get_running_loop().create_future()

        def on_ready(block_ids: list[int]) -> None:
            granted = _Granted(block_ids, self._engine.engine.kv_cache.fence())
            self._engine.in_loop(_resolve, blocks, granted)

        await self._engine.call(lambda engine: engine.extend(self._seq.seq_id, on_ready))
        return await blocks

    async def _commit(self, first: FirstToken, sampled_at: float, on_commit: OnCommit) -> None:
        def committed(ended: SequenceOutput | None) -> None:
            self.state = HandoffState.COMMITTED
            first.timings_pb.handoff_s = self._clock() - sampled_at
            on_commit(first, ended)

        def commit(engine: Engine) -> None:
            ended = engine.commit(self._seq.seq_id, first.logprobs, first.draft)
            self._engine.in_loop(committed, ended)

        if self.needs_no_kv:
            committed(None)
        else:
            await self._engine.call(commit)
        log.info(
            "handoff_committed",
            request_id=self._spec_pb.request_id,
            num_blocks=self._num_blocks,
            num_held_blocks=self._num_held_blocks,
            num_bytes=self.num_bytes,
            carrier=self.carrier_name,
            handoff_s=first.timings_pb.handoff_s,
        )

    async def _check_ended_well(self, call: FrameCall) -> None:
        """Raises HandoffFailed unless the prefill worker held its blocks until it was told of the commit."""
        code = await call.code()
        check_cancelled()
        if code is not grpc.StatusCode.OK:
            raise HandoffFailed(
                f"prefill worker {self._address} gave the blocks up before they were copied: {code.name}",
                state=self.state.value,
            )

    def _tell_rate(self, sampled_at: float) -> None:
        """What the compute did not hide."""
        if not self.needs_no_kv:
            came_before = bisect_right(self._arrivals, sampled_at, key=itemgetter(0))
            num_hidden = self._arrivals[came_before - 1][1] if came_before else 0
            elapsed_s = self._clock() - sampled_at
            self._environment.rates.observe(self.carrier_name, self.num_bytes - num_hidden, elapsed_s)

    def _first_token(self, started_pb: PrefillStarted, finished_pb: PrefillFinished) -> FirstToken:
        token_id = finished_pb.first_token_id
        has_logprobs = finished_pb.HasField("first_token_logprobs")
        timings_pb = RequestTimings(
            prefill_worker_id=started_pb.worker_id,
            num_hit_tokens=self._num_hit_tokens(started_pb, finished_pb),
            queue_s=started_pb.queue_s,
            prefill_s=finished_pb.prefill_s,
            transfer_bytes=self.num_bytes,
            num_loaded_tokens=finished_pb.num_loaded_tokens,
            num_fetched_tokens=finished_pb.num_fetched_tokens,
            load_s=finished_pb.load_s,
        )
        return FirstToken(
            logprobs=logprobs_from_pb(finished_pb.first_token_logprobs)
            if has_logprobs
            else TokenLogprobs(token_id, 0.0),
            prompt_logprobs_pb=list(finished_pb.prompt_logprobs),
            timings_pb=timings_pb,
            is_last=self.needs_no_kv,
            draft=draft_from_pb(finished_pb.draft) if finished_pb.HasField("draft") else None,
        )

    def _num_hit_tokens(self, started_pb: PrefillStarted, finished_pb: PrefillFinished) -> int:
        num_held_tokens = 0 if self.needs_no_kv else self._num_held_blocks * self._block_size
        # Those that a load brought were not known when the prefill worker started.
        num_loaded_tokens = finished_pb.num_loaded_tokens + finished_pb.num_fetched_tokens
        return max(started_pb.num_hit_tokens + num_loaded_tokens, num_held_tokens)


async def _next(call: FrameCall) -> Frame:
    return await next_frame(call, FrameKind.PREFILL_FINISHED)


async def _say_committed(call: FrameCall) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # the call has ended: its code tells
        await call.write(pack_frame(FrameKind.PREFILL_COMMITTED, PrefillCommitted()))
        await call.done_writing()


async def _tell_committed(call: FrameCall) -> None:
    """The sequence is ours already: a prefill worker that cannot be told any more changes nothing."""
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await _say_committed(call)
            await call.code()
    check_cancelled()


def _resolve(future: asyncio.Future[_Granted], granted: _Granted) -> None:
    if not future.done():
        future.set_result(granted)
