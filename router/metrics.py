"""baton_router_*: what users of this router see. Most of it is told by model (router/model_metrics.py)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

from router.model_metrics import PREFIX, ModelFamilies, ModelMetrics
from router.refusals import NotAllowed, NotAuthenticated, QuotaExceeded
from servicekit.errors import Overloaded, ServingError

_REFUSALS: dict[type[ServingError], str] = {
    NotAuthenticated: "no_key",
    NotAllowed: "not_allowed",
    QuotaExceeded: "quota",
    Overloaded: "capacity",
}


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry, models: Iterable[str]) -> None:
        """`models`: the names of those that are served."""
        families = ModelFamilies(registry)
        self._by_model = {model: ModelMetrics(families, model) for model in models}
        self._requests = Counter(
            f"{PREFIX}_requests_total", "HTTP requests ended", ("endpoint", "outcome"), registry=registry
        )
        self._refused = Counter(
            f"{PREFIX}_refused_total",
            "Turned away before any work: no key, not allowed, quota, capacity",
            ("reason",),
            registry=registry,
        )
        for reason in _REFUSALS.values():
            self._refused.labels(reason)  # 0 is a number, no series is none

    def of(self, model: str) -> ModelMetrics:
        return self._by_model[model]

    def refused(self, error: ServingError) -> None:
        """Before anything was answered. Other errors are not counted here."""
        reason = _REFUSALS.get(type(error))
        if reason is not None:
            self._refused.labels(reason).inc()

    def request_ended(self, endpoint: str, outcome: str) -> None:
        """`outcome`: ok, disconnected or the HTTP status of the error."""
        self._requests.labels(endpoint, outcome).inc()
