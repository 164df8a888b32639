"""From bytes on the wire to a checked request; a mistake becomes an InvalidRequest that names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from router.http_errors import ClientGone
from router.refusals import RequestTimeout
from servicekit.errors import InvalidRequest
from servicekit.logging import get_logger

log = get_logger(__name__)

T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """InvalidRequest with code request_too_large as soon as it is too long; RequestTimeout."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _receive_body(request, max_bytes)
    except TimeoutError:
        raise RequestTimeout(f"the request body did not arrive within {timeout_s:g} s") from None


async def _receive_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def parse_body(cls: type[T], body: bytes, *, rejects_unknown: bool = False) -> T:
    """Fields that are not known have no effect, or are refused when `rejects_unknown`."""
    try:
        parsed = cls.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None  # the cause would carry the prompt into logs
    if parsed.model_extra and rejects_unknown:
        name = sorted(parsed.model_extra)[0][:100]
        raise InvalidRequest(f"unknown field {name!r}", param=name, code="unknown_field")
    if parsed.model_extra:
        log.debug("unknown_fields_ignored", num_fields=len(parsed.model_extra))  # names may hold anything
    return parsed


def _too_large(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"the request body may have {max_bytes} bytes", code="request_too_large")


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first mistake; of a union's several the deepest, which is the alternative that fitted best."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return InvalidRequest(f"the body must be a JSON object: {first['msg']}")
    field = first["loc"][0]
    same_field = [mistake for mistake in mistakes if mistake["loc"][0] == field]
    if len({mistake["loc"][1:2] for mistake in same_field}) > 1:
        first = max(same_field, key=lambda mistake: _num_indexes(mistake))
    path = "".join(_step(step) for step in first["loc"][1:])
    return InvalidRequest(f"{field}{path}: {first['msg']}", param=str(field), code=None)


def _num_indexes(mistake: Mapping[str, Any]) -> int:
    return sum(isinstance(step, int) for step in mistake["loc"])


def _step(step: str | int) -> str:
    """Indexes and field names; not the names that pydantic gives to alternatives."""
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if step.isidentifier() and step not in ("str", "int") else ""
