"""Requests made up by schemathesis from the OpenAPI document of a running router."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

_TIMEOUT_S = 10.0  # of any one request
_REQUIRED = {"messages", "prompt", "input", "tokens", "max_tokens"}  # the rest of a body is thinned out
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def load_document(url: str) -> schemathesis.BaseSchema:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    schema.config.update(base_url=url)
    return schema


def fuzz(
    document: schemathesis.BaseSchema,
    path: str,
    mode: GenerationMode,
    *,
    model: str,
    num_examples: int,
    max_tokens: int | None = None,
) -> Counter[int]:
    """Statuses by how often they came; AssertionError for a 5xx, an error for one that takes too long.

    `max_tokens`: of any answer, for models that do not end by themselves.
    """
    statuses = Counter[int]()

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode), data=st.data())
    def ask(case: schemathesis.Case, data: st.DataObject) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _thinned(case.body, data) | {"model": model}
            if max_tokens is not None:
                name = _LIMITS[2] if path.endswith("responses") else _LIMITS[0]
                case.body = {k: v for k, v in case.body.items() if k not in _LIMITS} | {name: max_tokens}
        response = case.call(timeout=_TIMEOUT_S)
        case.validate_response(response, checks=[not_a_server_error])
        statuses[response.status_code] += 1

    ask()
    return statuses


def _thinned(body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """With three of the optional fields, and often with messages that every chat template takes."""
    optional = sorted(set(body) - _REQUIRED)
    kept = data.draw(st.sets(st.sampled_from(optional), max_size=3)) if optional else set()
    body = {name: value for name, value in body.items() if name in _REQUIRED | kept}
    if "messages" in body and data.draw(st.booleans()):
        body["messages"] = [{"role": "user", "content": "hi"}]
    return body
