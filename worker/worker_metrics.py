"""baton_worker_*: the process around the engine."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge


class WorkerMetrics:
    def __init__(
        self, registry: CollectorRegistry, num_requests: Callable[[], int], is_store_up: Callable[[], bool]
    ) -> None:
        held = Gauge(
            "baton_worker_held_requests",
            "requests taken and not ended, in any phase; without one, no sequence owns a block",
            registry=registry,
        )
        held.set_function(num_requests)
        store_up = Gauge("baton_worker_store_up", "1: Redis answered the last time", registry=registry)
        store_up.set_function(is_store_up)
