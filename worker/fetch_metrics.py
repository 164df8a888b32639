"""baton_fetch_*: blocks read from peers, and served to them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from servicekit.metrics import SECONDS_BUCKETS

# served: something was sent; missed: the blocks are gone; invalid: not a request that can be answered.
SERVED_OUTCOMES = ("served", "missed", "refused", "invalid", "stalled", "cancelled", "failed")
# met: compute was there first; short: the peer had fewer blocks than the index said.
FETCHED_OUTCOMES = (
    "finished",
    "met",
    "missed",
    "short",
    "refused",
    "lost",
    "stalled",
    "corrupt",
    "cancelled",
)


class FetchMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_fetch_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"baton_fetch_{name}", text, buckets=SECONDS_BUCKETS, registry=registry)

        self._served = counter("served_calls", "fetches of peers by how they ended here", "outcome")
        self._sent_bytes = counter("sent_bytes", "KV sent to peers, by carrier", "carrier")
        self._served_seconds = seconds("served_seconds", "one fetch of a peer, first frame to last")
        self._fetched = counter("calls", "fetches from peers by how they ended", "outcome")
        self._received_bytes = counter("received_bytes", "KV written here, by carrier", "carrier")
        self._fetch_seconds = seconds("seconds", "one fetch from a peer, start to end")
        self._fetched_blocks = counter("blocks", "KV blocks that came from peers")
        for outcome in SERVED_OUTCOMES:
            self._served.labels(outcome)
        for outcome in FETCHED_OUTCOMES:
            self._fetched.labels(outcome)

    def served(self, outcome: str, elapsed_s: float) -> None:
        self._served.labels(outcome).inc()
        self._served_seconds.observe(elapsed_s)

    def sent(self, carrier: str, num_bytes: int) -> None:
        self._sent_bytes.labels(carrier).inc(num_bytes)

    def fetched(self, outcome: str, elapsed_s: float, num_blocks: int) -> None:
        self._fetched.labels(outcome).inc()
        self._fetch_seconds.observe(elapsed_s)
        self._fetched_blocks.inc(num_blocks)

    def received(self, carrier: str, num_bytes: int) -> None:
        self._received_bytes.labels(carrier).inc(num_bytes)
