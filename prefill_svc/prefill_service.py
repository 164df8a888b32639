"""/baton.v1.PrefillService/Prefill on raw frames: admission, layout check, error boundary."""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio

from prefill_svc.metrics import PrefillMetrics
from prefill_svc.prefill_call import PrefillCall, ServicerContext
from prefill_svc.prefill_trace import PrefillTrace
from proto.prefill_pb2 import PrefillRequest
from servicekit.errors import HandoffFailed, ServingError
from servicekit.logging import get_logger
from servicekit.rpc import abort_with
from worker.admission import Admission
from worker.conversions import layout_difference
from worker.deadline import Deadline
from worker.kv_frames import PREFILL_METHOD, PREFILL_SERVICE, FrameKind, read_request
from worker.peer_fetcher import PeerFetcher
from worker.transfers import TransferEnvironment

log = get_logger(__name__)


class PrefillService:
    def __init__(
        self,
        transfers: TransferEnvironment,
        fetcher: PeerFetcher,
        admission: Admission,
        metrics: PrefillMetrics,
        *,
        worker_id: str,
    ) -> None:
        self._transfers = transfers
        self._fetcher = fetcher
        self._admission = admission
        self._metrics = metrics
        self._worker_id = worker_id

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        # No serializers: a frame is bytes on both sides.
        method = grpc.stream_stream_rpc_method_handler(self.prefill)
        return grpc.method_handlers_generic_handler(PREFILL_SERVICE, {PREFILL_METHOD: method})

    async def prefill(self, _requests: object, context: ServicerContext[Any, Any]) -> None:
        outcome = "cancelled"
        request_id: str | None = None
        try:
            request_pb = await read_request(context, FrameKind.PREFILL_REQUEST, PrefillRequest)
            request_id = request_pb.sequence.request_id
            with PrefillTrace(self._transfers.tracer, request_pb.sequence) as trace:
                outcome = "committed" if await self._serve(request_pb, context, trace) else "uncommitted"
        except ServingError as error:
            outcome = type(error).__name__
            await abort_with(context, error)
        except ValueError as error:
            outcome = "HandoffFailed"
            await abort_with(
                context, HandoffFailed(f"not the frames of a hand-off: {error}", state="RESERVED")
            )
        except Exception as error:
            outcome = "ServingError"
            log.exception("prefill_failed", request_id=request_id)
            await abort_with(context, ServingError(f"prefill failed: {type(error).__name__}"))
        finally:
            self._metrics.count_request(outcome)
            if outcome not in ("committed", "uncommitted"):
                log.info("prefill_ended_early", request_id=request_id, outcome=outcome)

    async def _serve(
        self, request_pb: PrefillRequest, context: ServicerContext[Any, Any], trace: PrefillTrace
    ) -> bool:
        difference = layout_difference(self._transfers.engine.engine.kv_layout, request_pb.kv_layout)
        if difference is not None:
            raise HandoffFailed(f"KV layouts differ (prefill != decode): {difference}", state="RESERVED")
        started_at = time.monotonic()
        with self._admission.admit():
            deadline = Deadline(request_pb.sequence.time_left_s)
            async with deadline.enforced():
                call = PrefillCall(self._transfers, self._worker_id, request_pb, trace)
                try:
                    with self._fetcher.offered(request_pb, deadline) as source:
                        is_committed = await call.run(context, source)
                finally:
                    self._metrics.observe_call(call)
        log.info(
            "prefill_committed" if is_committed else "prefill_uncommitted",
            request_id=request_pb.sequence.request_id,
            num_prompt_tokens=call.num_prompt_tokens,
            num_bytes=call.num_bytes,
            elapsed_s=time.monotonic() - started_at,
        )
        return is_committed
