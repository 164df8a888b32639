"""baton_prefill_*."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from prefill_svc.prefill_call import PrefillCall
from servicekit.metrics import SECONDS_BUCKETS


class PrefillMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_prefill_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"baton_prefill_{name}", text, buckets=SECONDS_BUCKETS, registry=registry)

        self._requests = counter("requests", "calls by how they ended", "outcome")
        self._prompt_tokens = counter("prompt_tokens", "of the calls that finished")
        self._hit_tokens = counter(
            "hit_tokens", "prompt tokens of started calls found in this worker's cache"
        )
        self._sent_bytes = counter("sent_bytes", "KV announced to decode workers, by carrier", "carrier")
        self._queue_seconds = seconds("queue_seconds", "from the request to its first scheduled step")
        self._ttft_seconds = seconds("ttft_seconds", "from the request to the first token")
        self._prefill_seconds = seconds("prefill_seconds", "from the first scheduled step to the first token")

    def count_request(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def observe_call(self, call: PrefillCall) -> None:
        if call.started is not None:
            self._queue_seconds.observe(call.started.queue_s)
            self._hit_tokens.inc(call.started.num_hit_tokens)
        if call.finished is not None:
            self._prefill_seconds.observe(call.finished.prefill_s)
            self._ttft_seconds.observe(call.finished.queue_s + call.finished.prefill_s)
            self._prompt_tokens.inc(call.num_prompt_tokens)
        if call.carrier_name is not None:
            self._sent_bytes.labels(call.carrier_name).inc(call.num_bytes)
