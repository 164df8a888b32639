from __future__ import annotations

import itertools
import json
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from servicekit.metrics import (
    BYTES_BUCKETS,
    SECONDS_BUCKETS,
    TOKENS_BUCKETS,
    MetricsServer,
    OtherName,
    OtherNames,
    TokenHistogram,
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


def test_another_page_answers_json_beside_the_metrics() -> None:
    server = MetricsServer(build_metrics_registry(), pages={"/state": lambda: {"experts": [[1, 2]]}})
    port = server.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/state", timeout=5) as response:
            assert response.headers["content-type"] == "application/json"
            assert json.load(response) == {"experts": [[1, 2]]}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            assert b"process_resident_memory_bytes" in response.read()
    finally:
        server.stop()


def test_a_check_answers_200_or_503_with_its_reason() -> None:
    reasons: list[str | None] = [None, "draining"]
    server = MetricsServer(build_metrics_registry(), checks={"/readyz": lambda: reasons.pop(0)})
    url = f"http://127.0.0.1:{server.start()}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            assert json.load(response) == {"status": "ok"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, timeout=5)
        with caught.value as refused:
            assert (refused.code, json.load(refused)) == (503, {"status": "draining"})
    finally:
        server.stop()


def test_numbers_have_another_name_with_their_labels_renamed_and_more_added() -> None:
    registry = CollectorRegistry()
    Gauge("baton_test_running", "Running.", registry=registry).set(3)
    finished = Counter("baton_test_finished", "Finished.", ["reason"], registry=registry)
    seconds = Histogram("baton_test_seconds", "Seconds.", buckets=[1.0, 2.0], registry=registry)
    gaps = TokenHistogram("baton_test_itl_seconds", "Gaps.", [1.0], registry)
    gaps.observe(0.5, num_tokens=4)
    names = [
        OtherName("baton_test_running", "other:running", "r"),
        OtherName("baton_test_finished", "other:success", "s", {"reason": "finished_reason"}),
        OtherName("baton_test_seconds", "other:latency_seconds", "l"),
        OtherName("baton_test_itl_seconds", "other:itl_seconds", "g"),
        OtherName("baton_test_itl_seconds", "other:old_itl_seconds", "g"),
        OtherName("baton_test_missing", "other:missing", "m"),
    ]
    OtherNames(registry, names, {"model_name": "tiny"})
    finished.labels("stop").inc(2)
    seconds.observe(1.5)
    page = render_metrics(registry)[0].decode()
    assert 'other:running{model_name="tiny"} 3.0' in page
    assert 'other:success_total{finished_reason="stop",model_name="tiny"} 2.0' in page
    assert 'other:latency_seconds_bucket{le="1.0",model_name="tiny"} 0.0' in page
    assert 'other:latency_seconds_bucket{le="2.0",model_name="tiny"} 1.0' in page
    assert 'other:latency_seconds_count{model_name="tiny"} 1.0' in page
    for name in ("itl", "old_itl"):
        assert f'other:{name}_seconds_count{{model_name="tiny"}} 4.0' in page
    assert "other:missing" not in page
    assert page.count("# TYPE other:success_total counter") == 1


def test_the_same_other_name_twice_is_refused() -> None:
    registry = CollectorRegistry()
    names = [OtherName("baton_test_running", "other:running", "r")]
    OtherNames(registry, names, {})
    with pytest.raises(ValueError, match="other:running"):
        OtherNames(registry, names, {})


def test_a_token_histogram_counts_each_token() -> None:
    registry = CollectorRegistry()
    histogram = TokenHistogram("baton_test_itl_seconds", "Gaps.", [0.1, 1.0], registry)
    histogram.observe(0.5, num_tokens=3)
    histogram.observe(5.0, num_zeros=2)
    sample = registry.get_sample_value
    assert sample("baton_test_itl_seconds_bucket", {"le": "0.1"}) == 2
    assert sample("baton_test_itl_seconds_bucket", {"le": "1.0"}) == 5
    assert sample("baton_test_itl_seconds_bucket", {"le": "+Inf"}) == 6
    assert sample("baton_test_itl_seconds_sum") == pytest.approx(6.5)
