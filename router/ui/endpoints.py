"""/ui and what is below it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.disconnect import DisconnectGuard
from router.http_errors import ClientGone
from router.ui.access import UiAccess
from router.ui.publisher import MAX_VIEWERS, Publisher

_STATIC = Path(__file__).parent / "static"
_PAGE = "index.html"
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, nobody's frame.
_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    body: bytes
    content_type: str
    etag: str


def load_static_files(directory: Path = _STATIC) -> dict[str, StaticFile]:
    """By name."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in _CONTENT_TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
            files[path.name] = StaticFile(body, _CONTENT_TYPES[path.suffix], etag)
    return files


class EventsResponse(Response):
    """What the publisher says, until the viewer leaves or the router drains."""

    def __init__(self, publisher: Publisher) -> None:
        headers = {**_SECURITY_HEADERS, "cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._publisher = publisher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            async with DisconnectGuard(receive), aclosing(cast(Any, self._publisher.follow())) as events:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def add_ui(app: FastAPI, access: UiAccess, publishers: Mapping[str, Publisher]) -> None:
    """`publishers` by the name of the model that they tell of; the first one when none is named."""
    files = load_static_files()

    @app.get("/ui", include_in_schema=False)
    async def show_page(request: Request) -> Response:
        access.check_page(request)
        return _file_response(files[_PAGE], request)

    @app.get("/ui/events", include_in_schema=False)
    async def follow_events(request: Request, model: str | None = None) -> Response:
        await access.check_data(request)
        name = next(iter(publishers)) if model is None else model
        if name not in publishers:
            raise HTTPException(404, f"the model {name!r} does not exist")
        if sum(publisher.num_viewers for publisher in publishers.values()) >= MAX_VIEWERS:
            raise HTTPException(503, f"{MAX_VIEWERS} viewers already look", {"retry-after": "10"})
        return EventsResponse(publishers[name])

    @app.get("/ui/{name}", include_in_schema=False)
    async def show_file(name: str, request: Request) -> Response:
        access.check_page(request)
        if name not in files or name == _PAGE:
            raise HTTPException(404, "Not Found")
        return _file_response(files[name], request)


def _file_response(file: StaticFile, request: Request) -> Response:
    headers: Mapping[str, str] = {**_SECURITY_HEADERS, "cache-control": "no-cache", "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(b"", 304, headers)
    return Response(file.body, 200, headers, file.content_type)
