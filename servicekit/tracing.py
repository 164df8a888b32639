"""OpenTelemetry traces: off unless an endpoint is set, and then one trace a request over all services.

span = tracer.start("request", traceparent)      # the caller's W3C trace context, or ""
span.event("routed", {"baton.decode_worker": "decode-0"})
span.end()                                       # always, in a finally

Parents are passed on explicitly, as span.traceparent: nothing depends on the task that happens to run. Spans
hold counts, names and durations, never text of a prompt or an answer. They leave from a thread of their own
through a bounded queue: a collector that is slow or away costs spans, never a request.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from servicekit.errors import ServingError
from servicekit.logging import get_logger

log = get_logger(__name__)

Attributes = Mapping[str, str | int | float | bool]

_TRACES_PATH = "/v1/traces"  # OTLP over HTTP
_EXPORT_TIMEOUT_S = 5.0
_CLOSE_S = 1.5  # for what is still queued when the process ends
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Span(Protocol):
    @property
    def traceparent(self) -> str:
        """For children, in this process or another."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes | None = None) -> None: ...

    def fail(self, error: BaseException | str) -> None:
        """Marks the span as failed. Of an exception that is not ours only the type is recorded."""
        ...

    def end(self) -> None:
        """Idempotent."""
        ...


class Tracer(Protocol):
    def start(self, name: str, traceparent: str = "", attributes: Attributes | None = None) -> Span:
        """A span from now on, child of `traceparent`; root of a new trace when that is no trace context."""
        ...

    def record(
        self, name: str, traceparent: str, attributes: Attributes, *, duration_s: float, ended_s_ago: float
    ) -> None:
        """A span that is over already."""
        ...

    def close(self) -> None:
        """Sends what is queued, for a few seconds at most; blocks meanwhile."""
        ...


class NoSpan:
    """Passes the caller's context on and remembers nothing."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def set(self, attributes: Attributes) -> None:
        pass

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        pass

    def fail(self, error: BaseException | str) -> None:
        pass

    def end(self) -> None:
        pass


NO_SPAN = NoSpan()


class NoTracer:
    def start(self, name: str, traceparent: str = "", attributes: Attributes | None = None) -> Span:
        return NoSpan(traceparent)

    def record(
        self, name: str, traceparent: str, attributes: Attributes, *, duration_s: float, ended_s_ago: float
    ) -> None:
        pass

    def close(self) -> None:
        pass


NO_TRACER = NoTracer()


def build_tracer(endpoint: str, service: str, instance: str = "") -> Tracer:
    """For OTLP over HTTP to `endpoint`, for example http://collector:4318; NoTracer when that is empty.

    ValueError when the endpoint is no URL, or the packages of the extra `tracing` are missing.
    """
    if not endpoint:
        return NO_TRACER
    scheme, _, rest = endpoint.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise ValueError("otlp_endpoint must be a URL like http://collector:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError("otlp_endpoint needs more packages: pip install 'baton-serve[tracing]'") from error
    url = endpoint if "/" in rest.rstrip("/") else endpoint.rstrip("/") + _TRACES_PATH
    # It would complain with every batch; we say once that the collector is away, and once that it is back.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    exporter: Any = ReportingExporter(OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S))
    return OtelTracer(BatchSpanProcessor(exporter), service, instance)


class ReportingExporter:
    """A SpanExporter whose failures are one line in the log each time they begin, and one when they end."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self._is_failing = False

    def export(self, spans: Sequence[Any]) -> Any:
        result = self._exporter.export(spans)
        is_failing = result.name != "SUCCESS"
        if is_failing and not self._is_failing:
            log.warning("traces_lost", num_spans=len(spans), reason="the collector did not take them")
        elif self._is_failing and not is_failing:
            log.info("traces_delivered_again")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


class OtelTracer:
    def __init__(self, processor: Any, service: str, instance: str = "") -> None:
        """`processor`: an OpenTelemetry SpanProcessor, owned from here on."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create(
            {"service.name": f"baton-{service}", "service.namespace": "baton"}
            | ({"service.instance.id": instance} if instance else {})
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("baton")

    def start(self, name: str, traceparent: str = "", attributes: Attributes | None = None) -> Span:
        span = self._tracer.start_span(name, _context(traceparent), attributes=_otel(attributes))
        return _OtelSpan(span)

    def record(
        self, name: str, traceparent: str, attributes: Attributes, *, duration_s: float, ended_s_ago: float
    ) -> None:
        ended_at = time.time_ns() - int(ended_s_ago * 1e9)
        started_at = ended_at - int(duration_s * 1e9)
        span = self._tracer.start_span(
            name, _context(traceparent), attributes=_otel(attributes), start_time=started_at
        )
        span.end(ended_at)

    def close(self) -> None:
        # A collector that does not answer must not hold up the end of the process.
        closing = threading.Thread(target=self._provider.shutdown, name="tracer close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


class _OtelSpan:
    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_otel(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, _otel(attributes))

    def fail(self, error: BaseException | str) -> None:
        from opentelemetry.trace import Status, StatusCode

        message = str(error) if isinstance(error, ServingError | str) else ""
        if isinstance(error, BaseException):
            kind = type(error).__name__
            self._span.add_event("exception", {"exception.type": kind, "exception.message": message})
            self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR, message))

    def end(self) -> None:
        if self._span.is_recording():  # not ended, and not left out by the caller's sampling
            self._span.end()


def _context(traceparent: str) -> Any:
    """An OpenTelemetry context; an empty one, not the current one, without a valid parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not _TRACEPARENT.fullmatch(traceparent):
        return Context()
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _otel(attributes: Attributes | None) -> dict[str, Any]:
    return dict(attributes or {})
