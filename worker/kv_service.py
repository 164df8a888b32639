"""/baton.v1.KvService/Fetch on raw frames: who may read, how much at once, error boundary."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio

from kvstore.block_hash import BlockHash
from proto.kv_pb2 import FetchRequest
from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError
from servicekit.logging import get_logger
from servicekit.rpc import abort_with
from worker.conversions import layout_difference
from worker.deadline import Deadline
from worker.fetch_call import STALL_S, FetchCall, ServicerContext
from worker.fetch_limit import FetchLimit
from worker.fetch_metrics import FetchMetrics
from worker.kv_frames import FETCH_METHOD, KV_SERVICE, FrameKind, read_request
from worker.transfers import TransferEnvironment

_REQUEST_S = 10.0  # for the first frame of a call

log = get_logger(__name__)


class KvService:
    def __init__(
        self,
        transfers: TransferEnvironment,
        metrics: FetchMetrics,
        *,
        worker_id: str,
        limit: FetchLimit | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._transfers = transfers
        self._engine = transfers.engine
        self._metrics = metrics
        self._worker_id = worker_id
        self.limit = limit or FetchLimit(transfers.engine.engine.num_blocks)
        self._stall_s = stall_s

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        # No serializers: a frame is bytes on both sides.
        method = grpc.stream_stream_rpc_method_handler(self.fetch)
        return grpc.method_handlers_generic_handler(KV_SERVICE, {FETCH_METHOD: method})

    async def fetch(self, _requests: object, context: ServicerContext) -> None:
        outcome = "cancelled"
        began = time.monotonic()
        try:
            async with asyncio.timeout(_REQUEST_S):
                request_pb = await read_request(context, FrameKind.FETCH_REQUEST, FetchRequest)
            num_blocks = await self._serve(request_pb, context)
            outcome = "served" if num_blocks else "missed"
        except ServingError as error:
            outcome = "refused"
            await abort_with(context, error)
        except ValueError as error:
            outcome = "invalid"
            await abort_with(context, InvalidRequest(f"not a fetch: {error}"))
        except TimeoutError:
            outcome = "stalled"
            await abort_with(context, Overloaded("the reader of a fetch takes too long"))
        except Exception as error:
            outcome = "failed"
            log.exception("fetch_failed")
            await abort_with(context, ServingError(f"fetch failed: {type(error).__name__}"))
        finally:
            self._metrics.served(outcome, time.monotonic() - began)

    async def _serve(self, request_pb: FetchRequest, context: ServicerContext) -> int:
        self._check(request_pb)
        with self.limit.admit(request_pb.num_blocks) as num_granted:
            async with Deadline(request_pb.time_left_s).enforced():
                hashes = await asyncio.to_thread(self._wanted_hashes, request_pb, num_granted)
                carrier = self._transfers.sending_carrier(request_pb)
                call = FetchCall(self._engine, self._worker_id, carrier, request_pb)
                try:
                    await _answer(call, context, hashes, self._stall_s)
                finally:
                    self._metrics.sent(carrier.name, call.tally.num_bytes)
        log.info(
            "fetch_served",
            request_id=request_pb.request_id,
            num_wanted_blocks=request_pb.num_blocks,
            num_blocks=call.num_blocks,
            num_bytes=call.tally.num_bytes,
        )
        return call.num_blocks

    def _check(self, request_pb: FetchRequest) -> None:
        engine = self._engine.engine
        difference = layout_difference(engine.kv_layout, request_pb.kv_layout)
        if difference is not None:
            raise HandoffFailed(f"KV layouts differ (holder != reader): {difference}", state="RESERVED")
        num_tokens = (request_pb.first_block + request_pb.num_blocks) * engine.kv_layout.block_size
        if request_pb.num_blocks < 1 or num_tokens > len(request_pb.token_ids):
            raise InvalidRequest(
                f"blocks [{request_pb.first_block}, {request_pb.first_block + request_pb.num_blocks}) are "
                f"{num_tokens} tokens; the request names {len(request_pb.token_ids)}"
            )
        if len(request_pb.token_ids) > engine.max_model_len:
            raise InvalidRequest(
                f"{len(request_pb.token_ids)} tokens; the longest context here is {engine.max_model_len}"
            )

    def _wanted_hashes(self, request_pb: FetchRequest, num_blocks: int) -> list[BlockHash]:
        """Made here from what the caller knows; a hash from outside would open other tenants' blocks."""
        chain = self._engine.engine.hash_chain
        end_block = request_pb.first_block + num_blocks
        token_ids = request_pb.token_ids[: end_block * chain.block_size]
        return chain.hashes(token_ids, request_pb.cache_salt, request_pb.tenant)[request_pb.first_block :]


async def _answer(call: FetchCall, context: ServicerContext, hashes: list[BlockHash], stall_s: float) -> None:
    try:
        await call.run(context, hashes, stall_s)
    except ValueError as error:
        raise HandoffFailed(f"a block here is damaged: {error}", state="TRANSFERRING") from error
