"""Leading blocks of one sequence, read from a peer while the sequence's front is computed here.

1. The engine starts the load: Fetch is opened on the peer.
2. The peer says how many of the blocks it still has; with fewer the load gets shorter.
3. Chunks come, the last blocks first; each is claimed, verified and written, until compute has met them.
4. Whatever goes wrong, the load fails and the engine computes what is missing: a fetch may cost a little
   time, never an answer.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import grpc.aio

from engine.kv_load import KvLoad
from kvstore.block_hash import BlockTier
from proto.common_pb2 import KvPeer, SequenceSpec
from proto.kv_pb2 import FetchFinished, FetchRequest, FetchStarted
from proto.prefill_pb2 import KvChunk
from servicekit.errors import ServingError, WorkerLost
from servicekit.frames import Frame
from servicekit.logging import get_logger
from servicekit.rpc import error_from_rpc
from worker.conversions import layout_to_pb
from worker.deadline import Deadline
from worker.fetch_metrics import FetchMetrics
from worker.fetch_rates import FetchRates
from worker.kv_frames import (
    FETCH_METHOD,
    KV_SERVICE,
    FrameCall,
    FrameKind,
    next_frame,
    open_call,
    pack_frame,
    read_header,
)
from worker.load_receiver import LoadReceiver
from worker.transfers import TransferEnvironment

PROGRESS_S = 5.0  # for each message of the peer; a slower one is not worth waiting for

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchEnvironment:
    """What all fetches of one worker share."""

    transfers: TransferEnvironment
    metrics: FetchMetrics
    rates: FetchRates
    spawn: Callable[[Coroutine[object, object, None]], asyncio.Task[None]]  # owns the task
    progress_s: float = PROGRESS_S


class PeerSource:
    """A KvSource (engine/kv_load.py). close() it when the sequence has ended."""

    tier: BlockTier | None = None

    def __init__(
        self, environment: FetchEnvironment, spec_pb: SequenceSpec, peer_pb: KvPeer, deadline: Deadline
    ) -> None:
        self.num_written_blocks = 0
        self._environment = environment
        self._transfers = environment.transfers
        self._spec_pb = spec_pb
        self._address = peer_pb.address
        self._deadline = deadline
        self._layout = environment.transfers.engine.engine.kv_layout
        num_tokens = len(spec_pb.prompt_ids) + len(spec_pb.output_ids)
        self.num_blocks = min(peer_pb.num_blocks, num_tokens // self._layout.block_size)
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def estimate_s(self, num_blocks: int) -> float:
        return self._environment.rates.estimate_s(num_blocks * self._layout.block_bytes)

    def start(self, load: KvLoad) -> None:
        self._transfers.engine.in_loop(self._begin, load)

    def close(self) -> None:
        """In the loop: nothing more is wanted. A load that goes on fails. Idempotent."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()

    def _begin(self, load: KvLoad) -> None:
        if self._is_closed:
            load.fail("the sequence has ended")
            return
        self._task = self._environment.spawn(self._run(load))
        # A task that is cancelled before it begins runs none of its own code.
        self._task.add_done_callback(lambda task: load.fail("cancelled") if task.cancelled() else None)

    async def _run(self, load: KvLoad) -> None:
        began = time.monotonic()
        outcome, reason = "cancelled", "cancelled"
        try:
            outcome, reason = await self._fetch(load), ""
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_rpc(rpc_error, peer=f"peer {self._address}")
            outcome, reason = "lost" if isinstance(error, WorkerLost) else "refused", str(error)
        except ServingError as error:
            outcome, reason = "refused", str(error)
        except ValueError as error:
            outcome, reason = "corrupt", str(error)
        except TimeoutError:
            outcome, reason = "stalled", f"no progress for {self._environment.progress_s} s"
        except Exception as error:
            outcome, reason = "lost", type(error).__name__
            log.exception("fetch_broke", request_id=self._spec_pb.request_id)
        finally:
            if reason:
                load.fail(reason)
            elapsed_s = time.monotonic() - began
            self._environment.metrics.fetched(outcome, elapsed_s, self.num_written_blocks)
            log.info(
                "fetch_ended",
                request_id=self._spec_pb.request_id,
                peer_address=self._address,
                outcome=outcome,
                reason=reason,
                num_wanted_blocks=load.end_block - load.first_block,
                num_blocks=self.num_written_blocks,
                elapsed_s=elapsed_s,
            )

    async def _fetch(self, load: KvLoad) -> str:
        """How it ended well."""
        is_shared_accepted = self._transfers.accepts_shared_memory_of(self._address)
        async with self._transfers.channels.channel(self._address) as channel:
            call = open_call(channel, KV_SERVICE, FETCH_METHOD)
            try:
                asked_at = time.monotonic()
                frame = await self._ask(call, self._request(load, is_shared_accepted))
                started_pb = read_header(frame, FrameKind.FETCH_STARTED, FetchStarted)
                latency_s = time.monotonic() - asked_at
                outcome = self._take_started(load, started_pb)
                if outcome == "missed":
                    return outcome
                with self._transfers.receiving_carrier(
                    started_pb, self._address, is_shared_accepted=is_shared_accepted
                ) as carrier:
                    receiver = LoadReceiver(load, self._transfers.engine.engine.kv_cache, carrier)
                    try:
                        has_met = await self._receive(call, receiver)
                    finally:
                        self._account(receiver, carrier.name, latency_s, time.monotonic() - asked_at)
                return "met" if has_met else outcome
            finally:
                call.cancel()

    def _take_started(self, load: KvLoad, started_pb: FetchStarted) -> str:
        num_wanted = load.end_block - load.first_block
        if started_pb.num_blocks > num_wanted:
            raise ValueError(f"asked for {num_wanted} blocks, it has {started_pb.num_blocks}")
        if started_pb.num_blocks == 0:
            load.fail("the peer has none of the blocks any more")
            return "missed"
        if started_pb.num_blocks < num_wanted:
            load.shorten(load.first_block + started_pb.num_blocks)
            return "short"
        return "finished"

    async def _receive(self, call: FrameCall, receiver: LoadReceiver) -> bool:
        """Whether compute met the blocks before all had come."""
        while (frame := await self._next(call)).kind == FrameKind.KV_CHUNK:
            chunk_pb = read_header(frame, FrameKind.KV_CHUNK, KvChunk)
            if not await receiver.receive(chunk_pb, frame.payload):
                return True
        finished_pb = read_header(frame, FrameKind.FETCH_FINISHED, FetchFinished)
        receiver.tally.verify(finished_pb)
        if not receiver.is_complete:
            raise ValueError("the stream finished before the first block came")
        return False

    async def _ask(self, call: FrameCall, request_pb: FetchRequest) -> Frame:
        async with asyncio.timeout(self._environment.progress_s):
            await call.write(pack_frame(FrameKind.FETCH_REQUEST, request_pb))
            return await next_frame(call, FrameKind.FETCH_STARTED)

    async def _next(self, call: FrameCall) -> Frame:
        async with asyncio.timeout(self._environment.progress_s):
            return await next_frame(call, FrameKind.FETCH_FINISHED)

    def _request(self, load: KvLoad, is_shared_accepted: bool) -> FetchRequest:
        num_tokens = load.end_block * self._layout.block_size
        token_ids = array("I", self._spec_pb.prompt_ids[:num_tokens])
        token_ids.extend(self._spec_pb.output_ids[: num_tokens - len(token_ids)])
        return FetchRequest(
            request_id=self._spec_pb.request_id,
            token_ids=token_ids,
            cache_salt=self._spec_pb.cache_salt,
            tenant=self._spec_pb.tenant,
            kv_layout=layout_to_pb(self._layout),
            first_block=load.first_block,
            num_blocks=load.end_block - load.first_block,
            host_id=self._transfers.host_id,
            accepts_shared_memory=is_shared_accepted,
            time_left_s=self._deadline.time_left_s,
        )

    def _account(self, receiver: LoadReceiver, carrier: str, latency_s: float, elapsed_s: float) -> None:
        self.num_written_blocks = receiver.num_written_blocks
        num_bytes = receiver.num_written_blocks * self._layout.block_bytes
        self._environment.metrics.received(carrier, num_bytes)
        if num_bytes:
            transfer_s = elapsed_s - latency_s
            self._environment.rates.observe(num_bytes, latency_s=latency_s, transfer_s=transfer_s)
