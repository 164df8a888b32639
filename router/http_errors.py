"""Errors as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from router.refusals import NotAllowed, NotAuthenticated, QuotaExceeded, RequestTimeout
from servicekit.errors import InvalidRequest, Overloaded, ServingError
from servicekit.logging import get_logger

log = get_logger(__name__)

_NOT_FOUND_CODES = {"model_not_found"}
_TOO_LARGE_CODES = {"request_too_large", "request_exceeds_quota"}
_REFUSALS: dict[type[ServingError], tuple[int, str, str]] = {  # status, type and code of OpenAI's error body
    NotAuthenticated: (401, "invalid_request_error", "invalid_api_key"),
    NotAllowed: (403, "permission_error", "not_allowed"),
    RequestTimeout: (408, "invalid_request_error", "request_timeout"),
    QuotaExceeded: (429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: (503, "overloaded_error", "overloaded"),
}


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


def error_status(error: ServingError) -> int:
    if isinstance(error, InvalidRequest):
        if error.code in _NOT_FOUND_CODES:
            return 404
        return 413 if error.code in _TOO_LARGE_CODES else 400
    refusal = _REFUSALS.get(type(error))
    return refusal[0] if refusal else 500


def error_body(error: ServingError) -> dict[str, Any]:
    if isinstance(error, InvalidRequest):
        return _body(str(error), "invalid_request_error", param=error.param, code=error.code)
    refusal = _REFUSALS.get(type(error))
    if refusal:
        return _body(str(error), refusal[1], code=refusal[2])
    return _body(str(error) or "the server failed", "server_error", code="server_error")


def error_headers(error: ServingError) -> dict[str, str]:
    headers = {}
    if isinstance(error, Overloaded | QuotaExceeded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, QuotaExceeded):
        headers |= error.headers
    if isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(
    error: ServingError, body_of: Callable[[ServingError], dict[str, Any]] = error_body
) -> Response:
    return _json(body_of(error), error_status(error), error_headers(error))


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json(_body(message, "invalid_request_error"), error.status_code, dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("request_failed", path=request.url.path, error=type(error).__name__)
    return _json(_body("the server failed", "server_error", code="server_error"), 500, {})


def _body(message: str, type: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _json(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
