"""baton_router_*{model_name}: what users of one model see, and how well the policy guesses.

TTFT: accepted -> first token written. TPOT: mean gap after it, one value a sequence. ITL: gaps between
tokens; an update of k tokens is one gap and k - 1 zeros. E2E: accepted -> last token.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from proto.link_pb2 import RequestTimings
from router.activity import Activity
from router.policy import Decision
from servicekit.metrics import SECONDS_BUCKETS, TOKENS_BUCKETS, TokenHistograms

PREFIX = "baton_router"
_MODEL = "model_name"


class ModelFamilies:
    """The metrics of all models, one series of each for a model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", doc, (_MODEL, *labels), registry=registry)

        def histogram(name: str, doc: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", doc, (_MODEL,), buckets=buckets, registry=registry)

        self.in_flight = Gauge(
            f"{PREFIX}_requests_in_flight", "Sequences being served", (_MODEL,), registry=registry
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of served sequences")
        self.generated_tokens = counter("generated_tokens_total", "Tokens generated")
        self.hit_tokens = counter("hit_tokens_total", "Prompt tokens found in a worker's prefix cache")
        self.predicted_hit_tokens = counter(
            "predicted_hit_tokens_total", "Hit tokens that the policy expected, by first tokens"
        )
        self.hit_error = histogram(
            "hit_error_tokens", "Expected minus real hit tokens without its sign, by sequence", TOKENS_BUCKETS
        )
        self.predicted_ttft = histogram("predicted_ttft_seconds", "Routed to first token, as expected")
        self.ttft_error = histogram(
            "ttft_error_seconds", "Expected minus real time from routed to first token without its sign"
        )
        self.peer_offers = counter("peer_offers_total", "Routes that name a peer to fetch blocks from")
        self.finished = counter("finished_total", "Sequences ended: stop, length or abort", "reason")
        self.migrations = counter("migrations_total", "Sequences submitted again after a failure")
        self.decisions = counter("decisions_total", "Routes chosen", "decode_reason", "prefill_reason")
        self.ttft = histogram("ttft_seconds", "Accepted to first token")
        self.tpot = histogram("tpot_seconds", "Mean time per output token after the first, by sequence")
        self.itl = TokenHistograms(
            f"{PREFIX}_itl_seconds", "Gaps between tokens", SECONDS_BUCKETS, _MODEL, registry
        )
        self.e2e = histogram("e2e_seconds", "Accepted to last token")
        self.prompt_length = histogram("prompt_length_tokens", "Prompt length", TOKENS_BUCKETS)


class ModelMetrics:
    def __init__(self, families: ModelFamilies, model: str) -> None:
        self.activity = Activity()  # the latest of it all in detail, for /ui
        self.in_flight: Gauge = families.in_flight.labels(model)
        self.itl = families.itl.of(model)
        self._model = model
        self._prompt_tokens = families.prompt_tokens.labels(model)
        self._generated_tokens = families.generated_tokens.labels(model)
        self._hit_tokens = families.hit_tokens.labels(model)
        self._predicted_hit_tokens = families.predicted_hit_tokens.labels(model)
        self._hit_error = families.hit_error.labels(model)
        self._predicted_ttft = families.predicted_ttft.labels(model)
        self._ttft_error = families.ttft_error.labels(model)
        self._peer_offers = families.peer_offers.labels(model)
        self._finished = {reason: families.finished.labels(model, reason) for reason in _REASONS}
        self._migrations = families.migrations.labels(model)
        self._decisions = families.decisions
        self._ttft = families.ttft.labels(model)
        self._tpot = families.tpot.labels(model)
        self._e2e = families.e2e.labels(model)
        self._prompt_length = families.prompt_length.labels(model)

    def routed(self, decision: Decision) -> None:
        self._decisions.labels(self._model, decision.decode_reason, decision.prefill_reason).inc()
        if decision.peer_id is not None:
            self._peer_offers.inc()

    def predicted(self, decision: Decision, timings: RequestTimings, *, ttft_s: float) -> None:
        """The first token of a route is there. ttft_s: since it was routed."""
        self._predicted_hit_tokens.inc(decision.num_hit_tokens)
        self._hit_error.observe(abs(decision.num_hit_tokens - timings.num_hit_tokens))
        self._predicted_ttft.observe(decision.terms.ttft_s)
        self._ttft_error.observe(abs(decision.terms.ttft_s - ttft_s))

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
        self._finished[reason].inc()
        self._e2e.observe(e2e_s)
        self._generated_tokens.inc(num_tokens)
        if num_tokens >= 2:
            self._tpot.observe(decode_s / (num_tokens - 1))
            self.activity.sequence_ended(decode_s / (num_tokens - 1))


_REASONS = ("stop", "length", "abort")  # all of them from the start: 0 is a number, no series is none
