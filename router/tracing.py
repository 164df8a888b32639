"""The root span of a request: counts and outcome, never text."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from router.choice import Choice
from servicekit.tracing import Span, Tracer


def trace_request(tracer: Tracer, request: Request, request_id: str, model_name: str) -> Span:
    """Begins the span `request`, a child of the client's traceparent header if there is one."""
    attributes = {
        "baton.request_id": request_id,
        "gen_ai.request.model": model_name,
        "http.request.method": request.method,
        "url.path": request.url.path,
    }
    return tracer.start("request", request.headers.get("traceparent", ""), attributes)


def end_request(span: Span, choices: Sequence[Choice], outcome: str) -> None:
    """`outcome`: as in the metrics. Ends the span."""
    if outcome == "failed":
        span.fail(outcome)  # a bug, or the server was stopped
    prompt_tokens = {choice.prompt_index: choice.flow.num_prompt_tokens for choice in choices}
    span.set(
        {
            "baton.outcome": outcome,
            "baton.num_choices": len(choices),
            "baton.num_hit_tokens": sum(choice.num_hit_tokens for choice in choices),
            "gen_ai.usage.input_tokens": sum(prompt_tokens.values()),
            "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
        }
    )
    span.end()
