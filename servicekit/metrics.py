"""Prometheus metrics: bucket sets, a registry per process, and the page they are read from.

Names are baton_<component>_<quantity>_<unit>, base units, _total for counters; labels only from closed sets,
never ids.
"""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, exposition

# Latencies from a streamed token to a long queue: about 1-2.5-5 per decade.
SECONDS_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
BYTES_BUCKETS = tuple(float(4**power * 1024) for power in range(12))  # 1 KiB to 4 GiB
TOKENS_BUCKETS = tuple(float(2**power) for power in range(18))  # 1 to 131,072


def build_metrics_registry() -> CollectorRegistry:
    """Its own registry (two services in one test process do not collide), with CPU, memory and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def render_metrics(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The page and its content type, for a service that has an HTTP server already."""
    return exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4


class MetricsServer:
    """Owns the HTTP server and its thread; start() and stop() once each."""

    def __init__(self, registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> None:
        self._registry = registry
        self._host = host
        self._port = port  # 0: any free one
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """The bound port. OSError when it is taken."""
        self._server, self._thread = exposition.start_http_server(self._port, self._host, self._registry)
        return self._server.server_port

    def stop(self) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None
