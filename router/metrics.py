"""baton_router_*: what users of this router see, and how well the policy guesses.

TTFT: accepted -> first token written. TPOT: mean gap after it, one value a sequence. ITL: gaps between
tokens; an update of k tokens is one gap and k - 1 zeros. E2E: accepted -> last token.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from proto.link_pb2 import RequestTimings
from router.activity import Activity
from router.policy import Decision
from router.refusals import NotAllowed, NotAuthenticated, QuotaExceeded
from servicekit.errors import Overloaded, ServingError
from servicekit.metrics import SECONDS_BUCKETS, TOKENS_BUCKETS, TokenHistogram

_PREFIX = "baton_router"
_REFUSALS: dict[type[ServingError], str] = {
    NotAuthenticated: "no_key",
    NotAllowed: "not_allowed",
    QuotaExceeded: "quota",
    Overloaded: "capacity",
}


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, doc: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{_PREFIX}_{name}", doc, labels, registry=registry)

        def histogram(name: str, doc: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", doc, buckets=buckets, registry=registry)

        self.activity = Activity()  # the latest of it all in detail, for /ui
        self._requests = counter("requests_total", "HTTP requests ended", ("endpoint", "outcome"))
        self.in_flight = Gauge(f"{_PREFIX}_requests_in_flight", "Sequences being served", registry=registry)
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of served sequences")
        self._generated_tokens = counter("generated_tokens_total", "Tokens generated")
        self._hit_tokens = counter("hit_tokens_total", "Prompt tokens found in a worker's prefix cache")
        self._predicted_hit_tokens = counter(
            "predicted_hit_tokens_total", "Hit tokens that the policy expected, by first tokens"
        )
        self._hit_error = histogram(
            "hit_error_tokens", "Expected minus real hit tokens without its sign, by sequence", TOKENS_BUCKETS
        )
        self._predicted_ttft = histogram("predicted_ttft_seconds", "Routed to first token, as expected")
        self._ttft_error = histogram(
            "ttft_error_seconds", "Expected minus real time from routed to first token without its sign"
        )
        self._peer_offers = counter("peer_offers_total", "Routes that name a peer to fetch blocks from")
        self._finished = counter("finished_total", "Sequences ended: stop, length or abort", ("reason",))
        for reason in ("stop", "length", "abort"):
            self._finished.labels(reason)  # 0 is a number, no series is none
        self._refused = counter(
            "refused_total", "Turned away before any work: no key, not allowed, quota, capacity", ("reason",)
        )
        for reason in _REFUSALS.values():
            self._refused.labels(reason)
        self._migrations = counter("migrations_total", "Sequences submitted again after a failure")
        self._decisions = counter("decisions_total", "Routes chosen", ("decode_reason", "prefill_reason"))
        self._ttft = histogram("ttft_seconds", "Accepted to first token")
        self._tpot = histogram("tpot_seconds", "Mean time per output token after the first, by sequence")
        self.itl = TokenHistogram(f"{_PREFIX}_itl_seconds", "Gaps between tokens", SECONDS_BUCKETS, registry)
        self._e2e = histogram("e2e_seconds", "Accepted to last token")
        self._prompt_length = histogram("prompt_length_tokens", "Prompt length", TOKENS_BUCKETS)

    def routed(self, decision: Decision) -> None:
        self._decisions.labels(decision.decode_reason, decision.prefill_reason).inc()
        if decision.peer_id is not None:
            self._peer_offers.inc()

    def predicted(self, decision: Decision, timings: RequestTimings, *, ttft_s: float) -> None:
        """The first token of a route is there. ttft_s: since it was routed."""
        self._predicted_hit_tokens.inc(decision.num_hit_tokens)
        self._hit_error.observe(abs(decision.num_hit_tokens - timings.num_hit_tokens))
        self._predicted_ttft.observe(decision.terms.ttft_s)
        self._ttft_error.observe(abs(decision.terms.ttft_s - ttft_s))

    def refused(self, error: ServingError) -> None:
        """Before anything was answered. Other errors are not counted here."""
        reason = _REFUSALS.get(type(error))
        if reason is not None:
            self._refused.labels(reason).inc()

    def migrated(self) -> None:
        self._migrations.inc()

    def first_token(self, *, ttft_s: float, num_prompt_tokens: int, num_hit_tokens: int) -> None:
        self.activity.first_token(ttft_s)
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._prompt_length.observe(num_prompt_tokens)
        self._hit_tokens.inc(num_hit_tokens)

    def gap(self, gap_s: float, num_tokens: int) -> None:
        """`num_tokens` came together after `gap_s`."""
        self.itl.observe(gap_s, num_zeros=num_tokens - 1)

    def sequence_ended(self, *, e2e_s: float, decode_s: float, num_tokens: int, reason: str) -> None:
        """`decode_s`: first to last token. `reason`: stop, length or abort."""
        self._finished.labels(reason).inc()
        self._e2e.observe(e2e_s)
        self._generated_tokens.inc(num_tokens)
        if num_tokens >= 2:
            self._tpot.observe(decode_s / (num_tokens - 1))
            self.activity.sequence_ended(decode_s / (num_tokens - 1))

    def request_ended(self, endpoint: str, outcome: str) -> None:
        """`outcome`: ok, disconnected or the HTTP status of the error."""
        self._requests.labels(endpoint, outcome).inc()
