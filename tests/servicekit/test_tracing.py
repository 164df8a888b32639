from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence

import pytest

from servicekit.errors import HandoffFailed
from servicekit.tracing import NO_TRACER, OtelTracer, ReportingExporter, build_tracer

sdk_export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> in_memory.InMemorySpanExporter:
    return in_memory.InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: in_memory.InMemorySpanExporter) -> OtelTracer:
    return OtelTracer(sdk_export.SimpleSpanProcessor(exporter), "router", "router-0")


def test_without_an_endpoint_nothing_is_traced_and_the_context_is_passed_on() -> None:
    tracer = build_tracer("", "router")
    assert tracer is NO_TRACER
    span = tracer.start("request", PARENT)
    span.event("routed")
    span.fail("gone")
    span.end()
    assert span.traceparent == PARENT


def test_a_child_is_in_the_trace_of_its_caller(tracer: OtelTracer, exporter: object) -> None:
    request = tracer.start("request", PARENT, {"baton.request_id": "abc"})
    sequence = tracer.start("sequence", request.traceparent)
    sequence.end()
    request.end()
    child, root = exporter.get_finished_spans()
    assert (
        format(root.context.trace_id, "032x")
        == PARENT.split("-")[1]
        == format(child.context.trace_id, "032x")
    )
    assert format(root.parent.span_id, "016x") == PARENT.split("-")[2]
    assert child.parent.span_id == root.context.span_id
    assert dict(root.attributes) == {"baton.request_id": "abc"}
    assert root.resource.attributes["service.name"] == "baton-router"
    assert root.resource.attributes["service.instance.id"] == "router-0"


@pytest.mark.parametrize("header", ["", "nonsense", "00-1-2-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_bad_traceparent_begins_a_new_trace(tracer: OtelTracer, exporter: object, header: str) -> None:
    tracer.start("request", header).end()
    [span] = exporter.get_finished_spans()
    assert span.parent is None
    assert span.context.trace_id != 0


def test_a_caller_that_does_not_sample_is_obeyed_and_its_context_handed_on(
    tracer: OtelTracer, exporter: object
) -> None:
    span = tracer.start("request", PARENT[:-2] + "00")
    span.set({"a": 1})
    span.fail("x")
    span.end()
    assert exporter.get_finished_spans() == ()
    assert span.traceparent.startswith(PARENT[:36])
    assert span.traceparent.endswith("-00")


def test_an_error_is_recorded_by_type_and_only_ours_with_its_message(
    tracer: OtelTracer, exporter: object
) -> None:
    ours, foreign = tracer.start("a"), tracer.start("b")
    ours.fail(HandoffFailed("3 chunks expected, 2 came", state="TRANSFERRING"))
    ours.end()
    foreign.fail(KeyError("the prompt of somebody"))
    foreign.end()
    first, second = exporter.get_finished_spans()
    assert not first.status.is_ok and not second.status.is_ok
    assert first.events[0].attributes["exception.message"] == "3 chunks expected, 2 came"
    assert second.attributes["error.type"] == "KeyError"
    assert "prompt" not in second.to_json()


def test_ending_twice_is_one_span(
    tracer: OtelTracer, exporter: object, caplog: pytest.LogCaptureFixture
) -> None:
    span = tracer.start("request")
    span.end()
    span.end()
    assert len(exporter.get_finished_spans()) == 1
    assert caplog.records == []


def test_a_span_of_the_past_has_its_times(tracer: OtelTracer, exporter: object) -> None:
    before = time.time_ns()
    tracer.record("queue", PARENT, {"n": 1}, duration_s=2.0, ended_s_ago=3.0)
    [span] = exporter.get_finished_spans()
    assert span.end_time - span.start_time == 2_000_000_000
    assert abs(before - span.end_time - 3_000_000_000) < 1_000_000_000


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://", "https:///"])
def test_an_endpoint_that_is_no_http_url_is_a_mistake(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"^otlp_endpoint must be a URL like http://collector:4318"):
        build_tracer(endpoint, "router")


def test_a_collector_that_is_away_is_one_line_and_its_return_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    success, failure = sdk_export.SpanExportResult.SUCCESS, sdk_export.SpanExportResult.FAILURE
    results = [success, failure, failure, success, success]

    class Exporter:
        def export(self, spans: Sequence[object]) -> object:
            return results[len(seen)]

    caplog.set_level(logging.INFO)
    exporter = ReportingExporter(Exporter())
    seen: list[object] = []
    for _ in results:
        seen.append(exporter.export([object()]))
    assert seen == results
    assert [record.getMessage() for record in caplog.records] == ["traces_lost", "traces_delivered_again"]


def test_a_collector_that_never_answers_delays_neither_spans_nor_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, logger="opentelemetry")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracer = build_tracer(f"http://127.0.0.1:{silent.getsockname()[1]}", "router")
        began = time.monotonic()
        for _ in range(5000):
            tracer.start("request").end()
        spans_s = time.monotonic() - began
        tracer.close()
        assert spans_s < 5
        assert time.monotonic() - began < spans_s + 4.5
