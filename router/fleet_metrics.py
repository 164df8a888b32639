"""baton_router_*: the fleet as this router sees it, read from the records of the registry at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.worker_record import WorkerRecord
from router.fleet import Fleet
from router.link import Link

_PREFIX = "baton_router"
_STATES = ("ready", "draining", "suspected", "unlinked")


class FleetMetrics(Collector):
    def __init__(
        self, registry: CollectorRegistry, fleets: Mapping[str, Fleet], is_store_up: Callable[[], bool]
    ) -> None:
        """`fleets` by the name of the model that they serve. Registers itself."""
        self._fleets = fleets
        self._is_store_up = is_store_up
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return [_workers(), _waiting(), _kv_usage(), _store_up()]

    def collect(self) -> Iterator[Metric]:
        by_state, waiting, kv_usage = _workers(), _waiting(), _kv_usage()
        for model, fleet in self._fleets.items():
            workers = fleet.workers()
            states = Counter((record.role, _state(fleet, record, link)) for record, link in workers)
            for role in ("prefill", "decode"):
                for state in _STATES:
                    by_state.add_metric([model, role, state], states[role, state])
            decode = [record for record, _ in workers if record.role == "decode"]
            waiting.add_metric([model], float(sum(record.load.num_waiting for record in decode)))
            kv_usage.add_metric([model], _kv_usage_ratio(decode))
        yield from (by_state, waiting, kv_usage, _store_up(float(self._is_store_up())))


def _state(fleet: Fleet, record: WorkerRecord, link: Link | None) -> str:
    if record.is_draining:
        return "draining"
    if record.role == "decode":
        return "ready" if link is not None and link.is_up else "unlinked"
    return "suspected" if fleet.is_suspected(record) else "ready"


def _kv_usage_ratio(decode: list[WorkerRecord]) -> float:
    num_blocks = sum(record.num_blocks for record in decode)
    num_free = sum(min(record.load.num_free_blocks, record.num_blocks) for record in decode)
    return 1 - num_free / num_blocks if num_blocks else 0.0


def _workers() -> GaugeMetricFamily:
    # Not `role`: that is the label that targets of Prometheus have here.
    doc = "Registered workers; suspected: a hand-off just failed, unlinked: no link to it"
    return GaugeMetricFamily(f"{_PREFIX}_workers", doc, labels=["model_name", "worker_role", "state"])


def _waiting() -> GaugeMetricFamily:
    doc = "Sequences at the decode workers, of all routers, that do not decode yet"
    return GaugeMetricFamily(f"{_PREFIX}_waiting_sequences", doc, labels=["model_name"])


def _kv_usage() -> GaugeMetricFamily:
    doc = "Used KV blocks / all, over the decode workers"
    return GaugeMetricFamily(f"{_PREFIX}_kv_usage_ratio", doc, labels=["model_name"])


def _store_up(value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_store_up", "1: Redis answered the last time", value)
