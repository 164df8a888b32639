"""One request through three processes: one trace at a real OTLP receiver, one id in three logs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import HANDS_OFF, SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.sdk", reason="the extra 'tracing' is not installed")

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Collector:
    """Takes OTLP over HTTP on a free port."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.bodies.append(body)
        for resource_spans in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource_spans.resource.attributes}
            for scope in resource_spans.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]

    def trace(self, trace_id: str) -> dict[str, tuple[str, Any]]:
        """Service and span, by the span's name."""
        return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace_id}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def traced(
    tiny_model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    names = ("ROUTER", "PREFILL", "DECODE")
    environment = {f"BATON_{name}_OTLP_ENDPOINT": collector.url for name in names}
    environment["OTEL_BSP_SCHEDULE_DELAY"] = "200"
    directory = tmp_path_factory.mktemp("traced")
    with running_stack(tiny_model, directory, *SMALL, *HANDS_OFF, environment=environment) as stack:
        yield stack


def _ask(stack: Stack, prompt: list[int], headers: dict[str, str]) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    response = stack.client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text


def _attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_one_trace_has_the_spans_of_router_decode_and_prefill(traced: Stack, collector: Collector) -> None:
    _ask(traced, random_prompt(31, 400), {"traceparent": PARENT, "x-request-id": "trace-me"})
    wanted = {"request", "sequence", "queue", "prefill", "transfer", "decode"}
    wait_until(lambda: wanted <= set(collector.trace(TRACE_ID)), f"spans {wanted}", timeout_s=20)
    trace = collector.trace(TRACE_ID)
    services = {name: service for name, (service, _) in trace.items()}
    assert services == {
        "request": "baton-router",
        "sequence": "baton-decode",
        "transfer": "baton-decode",
        "decode": "baton-decode",
        "queue": "baton-prefill",
        "prefill": "baton-prefill",
    }
    spans = {name: span for name, (_, span) in trace.items()}
    assert spans["request"].parent_span_id.hex() == PARENT.split("-")[2]
    assert spans["sequence"].parent_span_id == spans["request"].span_id
    for name in ("queue", "prefill", "transfer", "decode"):
        assert spans[name].parent_span_id == spans["sequence"].span_id
    assert _attributes(spans["request"])["gen_ai.usage.input_tokens"] == 400
    assert _attributes(spans["request"])["gen_ai.usage.output_tokens"] == 8
    assert {event.name for event in spans["request"].events} == {"routed", "first_token"}
    chunks = [event for event in spans["prefill"].events if event.name == "chunk"]
    assert chunks
    assert _attributes(spans["prefill"])["baton.transfer_bytes"] == sum(
        _attributes(event)["baton.num_bytes"] for event in chunks
    )
    in_order = ("request", "sequence", "queue", "prefill", "decode")
    starts = [spans[name].start_time_unix_nano for name in in_order]
    assert starts == sorted(starts)
    ends = [spans[name].end_time_unix_nano for name in ("queue", "prefill", "decode", "sequence", "request")]
    assert ends[0] <= ends[1] <= ends[2] <= ends[3]
    assert ends[2] <= ends[4]


def test_a_prompt_computed_by_the_decode_worker_has_its_phases_too(
    traced: Stack, collector: Collector
) -> None:
    trace_id = TRACE_ID[:-1] + "d"
    _ask(traced, random_prompt(32, 20), {"traceparent": PARENT.replace(TRACE_ID, trace_id)})
    wanted = {"request", "sequence", "queue", "prefill", "decode"}
    wait_until(lambda: wanted <= set(collector.trace(trace_id)), f"spans {wanted}", timeout_s=20)
    assert set(collector.trace(trace_id)) == wanted
    assert {service for service, _ in collector.trace(trace_id).values()} == {"baton-router", "baton-decode"}


def test_a_refused_request_is_a_failed_span_and_prompts_never_leave(
    traced: Stack, collector: Collector
) -> None:
    trace_id = TRACE_ID[:-1] + "e"
    headers = {"traceparent": PARENT.replace(TRACE_ID, trace_id)}
    body = {"model": "tiny", "prompt": "a very secret prompt", "max_tokens": -1}
    assert traced.client.post("/v1/completions", json=body, headers=headers).status_code == 400
    assert traced.chat("another very secret prompt", max_tokens=4).status_code == 200
    wait_until(lambda: "request" in collector.trace(trace_id), "the span of the refusal", timeout_s=20)
    _, span = collector.trace(trace_id)["request"]
    assert span.status.code == 2
    assert _attributes(span)["baton.outcome"] == "400"
    wait_until(lambda: len([s for _, s in collector.spans if s.name == "decode"]) >= 3, "spans", timeout_s=20)
    assert not [body for body in collector.bodies if b"secret" in body]


def test_one_id_can_be_followed_through_the_logs_of_all_services(traced: Stack) -> None:
    _ask(traced, random_prompt(33, 300), {"x-request-id": "follow-me"})

    def events(process: str) -> list[str]:
        lines = [json.loads(line) for line in (traced.log_dir / f"{process}.log").read_text().splitlines()]
        return [line["event"] for line in lines if line.get("request_id") == "follow-me"]

    wanted = {
        "router": ["request_routed", "request_ended"],
        "prefill-0": ["prefill_started", "prefill_committed"],
        "decode-0": ["handoff_committed", "sequence_ended"],
    }
    wait_until(lambda: {name: events(name) for name in wanted} == wanted, f"events {wanted}", timeout_s=10)


def test_a_collector_that_is_away_changes_nothing_for_requests(tiny_model: Path, tmp_path: Path) -> None:
    names = ("ROUTER", "PREFILL", "DECODE")
    environment = {f"BATON_{name}_OTLP_ENDPOINT": "http://127.0.0.1:9" for name in names}
    with running_stack(tiny_model, tmp_path, *SMALL, environment=environment) as stack:
        for seed in range(4):
            _ask(stack, random_prompt(seed, 60), {})
        stack.assert_no_block_is_lost()
        restarts = [process["num_restarts"] for process in stack.state()["processes"]]
    assert not any(restarts)
