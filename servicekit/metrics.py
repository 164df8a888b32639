"""Prometheus metrics: bucket sets, a registry per process, and the page they are read from.

Names are baton_<component>_<quantity>_<unit>, base units, _total for counters; labels only from closed sets,
never ids.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# Latencies from a streamed token to a long queue: about 1-2.5-5 per decade.
SECONDS_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
BYTES_BUCKETS = tuple(float(4**power * 1024) for power in range(12))  # 1 KiB to 4 GiB
TOKENS_BUCKETS = tuple(float(2**power) for power in range(18))  # 1 to 131,072

_SAMPLE_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")


def build_metrics_registry() -> CollectorRegistry:
    """Its own registry (two services in one test process do not collide), with CPU, memory and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def render_metrics(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The page and its content type, for a service that has an HTTP server already."""
    return exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4


class TokenHistogram(Collector):
    """For values of each token: the library's histogram, with a lock and a loop, costs more than a token."""

    def __init__(
        self, name: str, doc: str, buckets: Sequence[float], registry: CollectorRegistry | None
    ) -> None:
        """`registry`: None for one of TokenHistograms, which tell it."""
        self.bounds = list(buckets)
        self.counts = [0] * (len(buckets) + 1)  # not cumulative; the last one is beyond all bounds
        self._name = name
        self._doc = doc
        self._sum = 0.0
        if registry is not None:
            registry.register(self)

    def observe(self, value: float, num_tokens: int = 1, num_zeros: int = 0) -> None:
        """`value` for each of `num_tokens`, and `num_zeros` more of 0."""
        self.counts[bisect_left(self.bounds, value)] += num_tokens
        self.counts[0] += num_zeros
        self._sum += value * num_tokens

    def describe(self) -> Iterable[Metric]:
        return [Metric(self._name, self._doc, "histogram")]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._doc)
        self.add_to(family)
        yield family

    def add_to(self, family: HistogramMetricFamily, *label_values: str) -> None:
        bounds = [*map(str, self.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        family.add_metric(label_values, buckets, self._sum)


class TokenHistograms(Collector):
    """One for each value of a label."""

    def __init__(
        self, name: str, doc: str, buckets: Sequence[float], label: str, registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._doc = doc
        self._buckets = buckets
        self._label = label
        self._by_value: dict[str, TokenHistogram] = {}
        registry.register(self)

    def of(self, value: str) -> TokenHistogram:
        if value not in self._by_value:
            self._by_value[value] = TokenHistogram(self._name, self._doc, self._buckets, None)
        return self._by_value[value]

    def describe(self) -> Iterable[Metric]:
        return [Metric(self._name, self._doc, "histogram")]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._doc, labels=[self._label])
        for value, histogram in self._by_value.items():
            histogram.add_to(family, value)
        yield family


@dataclass(frozen=True, slots=True)
class OtherName:
    """A metric family under the name that another system gives it."""

    own: str  # without _total
    other: str  # without _total
    doc: str
    renamed_labels: Mapping[str, str] = field(default_factory=dict)  # own label -> theirs


class OtherNames(Collector):
    """Numbers of a registry under other names too: copied when the page is read, kept once."""

    def __init__(
        self, registry: CollectorRegistry, names: Sequence[OtherName], labels: Mapping[str, str]
    ) -> None:
        """Registers itself. Families that `registry` does not have are left out. `labels`: on all samples."""
        self._names = names
        self._labels = dict(labels)
        samples = {name.own + suffix for name in names for suffix in _SAMPLE_SUFFIXES}
        self._source = registry.restricted_registry(samples)
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return [Metric(name.other, name.doc, "unknown") for name in self._names]

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in self._source.collect()}
        for name in self._names:
            if name.own in families:
                yield self._copy(families[name.own], name)

    def _copy(self, family: Metric, name: OtherName) -> Metric:
        copy = Metric(name.other, name.doc, family.type)
        for sample in family.samples:
            own = {name.renamed_labels.get(key, key): value for key, value in sample.labels.items()}
            suffix = sample.name[len(name.own) :]
            copy.add_sample(name.other + suffix, {**self._labels, **own}, sample.value)
        return copy


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class MetricsServer:
    """Owns the HTTP server and its thread; start() and stop() once each."""

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str = "127.0.0.1",
        port: int = 0,
        pages: Mapping[str, Callable[[], Any]] | None = None,
        checks: Mapping[str, Callable[[], str | None]] | None = None,
    ) -> None:
        """`pages`: more paths, each with what it answers as JSON.

        `checks`: paths that answer 200, or 503 with the reason that the check gives. Both are called on the
        server's threads.
        """
        self._metrics_app = exposition.make_wsgi_app(registry)
        self._pages = dict(pages or {})
        self._checks = dict(checks or {})
        self._host = host
        self._port = port  # 0: any free one
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """The bound port. OSError when it is taken."""
        self._server = make_server(
            self._host, self._port, self._answer, exposition.ThreadingWSGIServer, _QuietHandler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        return self._server.server_port

    def stop(self) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in self._checks:
            reason = self._checks[path]()
            status = "200 OK" if reason is None else "503 Service Unavailable"
            return _answer_json(start_response, status, {"status": reason or "ok"})
        if path in self._pages:
            return _answer_json(start_response, "200 OK", self._pages[path]())
        answer: Iterable[bytes] = self._metrics_app(environ, start_response)
        return answer


def _answer_json(start_response: Any, status: str, value: Any) -> list[bytes]:
    body = json.dumps(value, separators=(",", ":")).encode()
    start_response(status, [("content-type", "application/json"), ("content-length", str(len(body)))])
    return [body]
