"""baton_decode_* and baton_handoff_*."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from decode_svc.handoff import Handoff, HandoffState
from proto.link_pb2 import RequestTimings
from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost
from servicekit.metrics import BYTES_BUCKETS, SECONDS_BUCKETS


class DecodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(f"baton_{name}", text, buckets=buckets, registry=registry)

        self._requests = counter("decode_requests", "requests by how they ended", "outcome")
        self._prompt_tokens = counter("decode_prompt_tokens", "of all requests that ended")
        self._generated_tokens = counter("decode_generated_tokens", "sent to routers, first tokens included")
        self._hit_tokens = counter("decode_hit_tokens", "prompt tokens found in a cache, on either worker")
        self._finished = counter("decode_finished", "sequences that ended by themselves", "reason")
        for reason in ("stop", "length"):
            self._finished.labels(reason)  # 0 is a number, no series is none
        self._ttft_seconds = histogram("decode_ttft_seconds", "submitted to this worker -> first token")
        self._tpot_seconds = histogram("decode_tpot_seconds", "mean gap after the first token, by sequence")
        self._decode_seconds = histogram("decode_decode_seconds", "first token -> last token")
        self._e2e_seconds = histogram("decode_e2e_seconds", "submitted to this worker -> last token")
        self._queue_seconds = histogram("decode_queue_seconds", "waiting for prefill compute")
        self._prefill_seconds = histogram("decode_prefill_seconds", "first scheduled step to first token")
        self._handoffs = counter("handoffs", "by final state", "state")
        self._fallbacks = counter("handoff_fallbacks", "prefilled here after a failed hand-off", "reason")
        for kind in (HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost):
            self._fallbacks.labels(kind.__name__)
        self._handoff_seconds = histogram("handoff_seconds", "first token sampled to committed")
        self._transfer_seconds = histogram("handoff_transfer_seconds", "first KV chunk to last one")
        self._handoff_bytes = histogram("handoff_size_bytes", "KV of one hand-off", BYTES_BUCKETS)
        self._received_bytes = counter("handoff_bytes", "KV received, by carrier", "carrier")

    def count_request(self, outcome: str, num_prompt_tokens: int) -> None:
        self._requests.labels(outcome).inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def count_tokens(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)

    def count_fallback(self, error: ServingError) -> None:
        self._fallbacks.labels(type(error).__name__).inc()

    def observe_first_token(self, timings_pb: RequestTimings, *, ttft_s: float) -> None:
        self._ttft_seconds.observe(ttft_s)
        self._hit_tokens.inc(timings_pb.num_hit_tokens)
        self._queue_seconds.observe(timings_pb.queue_s)
        self._prefill_seconds.observe(timings_pb.prefill_s)
        if timings_pb.prefill_worker_id:
            self._handoff_seconds.observe(timings_pb.handoff_s)

    def observe_finished(self, *, e2e_s: float, decode_s: float, num_tokens: int, reason: str) -> None:
        """`reason`: stop or length."""
        self._finished.labels(reason).inc()
        self._e2e_seconds.observe(e2e_s)
        self._decode_seconds.observe(decode_s)
        if num_tokens >= 2:
            self._tpot_seconds.observe(decode_s / (num_tokens - 1))

    def observe_handoff(self, handoff: Handoff) -> None:
        self._handoffs.labels(handoff.state.value).inc()
        self._received_bytes.labels(handoff.carrier_name).inc(handoff.num_bytes)
        if handoff.state is HandoffState.COMMITTED:
            self._transfer_seconds.observe(handoff.transfer_s)
            self._handoff_bytes.observe(handoff.num_bytes)
