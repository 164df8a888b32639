from __future__ import annotations

import itertools
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import Counter

from servicekit.metrics import (
    BYTES_BUCKETS,
    SECONDS_BUCKETS,
    TOKENS_BUCKETS,
    MetricsServer,
    build_metrics_registry,
    render_metrics,
)


def test_the_page_is_served_on_a_free_port_until_stop() -> None:
    registry = build_metrics_registry()
    Counter("baton_test_requests_total", "Requests.", registry=registry).inc(3)
    server = MetricsServer(registry)
    port = server.start()
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        page = response.read().decode()
    server.stop()
    server.stop()
    assert "baton_test_requests_total 3.0" in page
    assert "process_resident_memory_bytes" in page
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_stop_leaves_no_thread() -> None:
    before = threading.active_count()
    server = MetricsServer(build_metrics_registry())
    server.start()
    server.stop()
    assert threading.active_count() == before


def test_a_taken_port_is_an_os_error() -> None:
    first = MetricsServer(build_metrics_registry())
    port = first.start()
    try:
        with pytest.raises(OSError):
            MetricsServer(build_metrics_registry(), port=port).start()
    finally:
        first.stop()


def test_two_services_of_one_process_do_not_collide() -> None:
    for _ in range(2):
        registry = build_metrics_registry()
        Counter("baton_test_steps_total", "Steps.", registry=registry).inc()
        assert b"baton_test_steps_total 1.0" in render_metrics(registry)[0]


@pytest.mark.parametrize("buckets", [SECONDS_BUCKETS, BYTES_BUCKETS, TOKENS_BUCKETS])
def test_buckets_grow(buckets: tuple[float, ...]) -> None:
    assert all(low < high for low, high in itertools.pairwise(buckets))


def test_bucket_sets_cover_what_baton_measures() -> None:
    assert SECONDS_BUCKETS[0] <= 0.001 and SECONDS_BUCKETS[-1] >= 60
    assert BYTES_BUCKETS[0] <= 1024 and BYTES_BUCKETS[-1] >= 1 << 30
    assert TOKENS_BUCKETS[0] == 1 and TOKENS_BUCKETS[-1] >= 128_000
