"""What real services, over a fake model, tell about one request: spans, and lines with its id."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from servicekit.tracing import OtelTracer
from tests.fakes.fake_model import build_fake_engine
from tests.fakes.fake_workers import GatedModel, decode_worker, greedy_spec, prefill_worker, router_link

sdk_export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]


class Spans:
    def __init__(self) -> None:
        self._exporter = in_memory.InMemorySpanExporter()
        self.tracer = OtelTracer(sdk_export.SimpleSpanProcessor(self._exporter), "test")

    def __getitem__(self, name: str) -> Any:
        [span] = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return span

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self._exporter.get_finished_spans())


@pytest.fixture
def spans() -> Spans:
    return Spans()


def _events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    fields = [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]
    return [(event, f.get("request_id")) for event, f in fields if event != "draining"]


async def test_a_hand_off_is_a_span_on_each_side(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with (
        prefill_worker(build_fake_engine(), tracer=spans.tracer) as prefill,
        decode_worker(build_fake_engine(), tracer=spans.tracer) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 8), prefill)
        await decode.until_idle()
        await prefill.until_idle()
    assert len(reply.token_ids) == 8
    assert spans.names == ["decode", "prefill", "queue", "sequence", "transfer"]
    assert {spans[name].parent.span_id for name in spans.names if name != "sequence"} == {
        spans["sequence"].context.span_id
    }
    assert spans["transfer"].attributes["baton.transfer_bytes"] > 0
    assert all(spans[name].status.is_ok or spans[name].status.is_unset for name in spans.names)
    assert sorted(_events(caplog)) == [
        ("handoff_committed", "test"),
        ("prefill_committed", "test"),
        ("prefill_started", "test"),
        ("sequence_ended", "test"),
    ]


async def test_a_prefill_worker_that_is_away_is_an_event_and_the_sequence_ends_well(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        decode_worker(build_fake_engine(), tracer=spans.tracer) as decode,
        router_link(decode) as router,
    ):
        await router.finish(greedy_spec(PROMPT, 4), "127.0.0.1:9")
        await decode.until_idle()
    assert spans.names == ["decode", "prefill", "queue", "sequence"]
    [event] = spans["sequence"].events
    assert (event.name, event.attributes["error.type"]) == ("prefill_fell_back", "WorkerLost")
    assert spans["sequence"].attributes["baton.outcome"] == "finished"
    assert _events(caplog) == [("prefill_fell_back", "test"), ("sequence_ended", "test")]


async def test_a_cancelled_hand_off_fails_its_spans_on_both_sides(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = GatedModel()
    async with (
        prefill_worker(build_fake_engine(model=model), tracer=spans.tracer) as prefill,
        decode_worker(build_fake_engine(), tracer=spans.tracer) as decode,
        router_link(decode) as router,
    ):
        model.hold()
        key, reply = await router.submit(greedy_spec(PROMPT, 8), prefill)
        await model.until_held()
        await router.cancel(key)
        await reply.ended.wait()
        model.open()
        await decode.until_idle()
        await prefill.until_idle()
    assert not spans["sequence"].status.is_ok
    assert spans["sequence"].attributes["error.type"] == "CancelledError"
    failed = [name for name in spans.names if not spans[name].status.is_ok and name != "sequence"]
    assert "prefill" in failed or "queue" in failed
    assert ("sequence_ended", "test") in _events(caplog)
    assert ("prefill_ended_early", "test") in _events(caplog)


async def test_a_refused_sequence_says_so_in_log_and_span(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        decode_worker(build_fake_engine(), tracer=spans.tracer) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec([1] * 5000, 4))
        await decode.until_idle()
    assert reply.last.HasField("error")
    assert spans.names == ["sequence"]
    assert spans["sequence"].attributes["error.type"] == "InvalidRequest"
    assert _events(caplog) == [("sequence_ended", "test")]


async def test_without_a_tracer_the_callers_context_reaches_the_prefill_worker() -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    spans = Spans()
    async with (
        prefill_worker(build_fake_engine(), tracer=spans.tracer) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        await router.finish(greedy_spec(PROMPT, 4, traceparent=traceparent), prefill)
        await prefill.until_idle()
    assert format(spans["prefill"].context.trace_id, "032x") == traceparent.split("-")[1]
