"""A small HTTP/1.1 client for measuring: one connection, one request at a time,
server-sent events by callback.

It shares the machine with the server that it measures, so it parses in C (httptools) and calls back straight
from the socket's read, with the time of that read: no queue, no task switch per token.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

OnEvent = Callable[
    [bytes, float], None
]  # the data of one event; time.perf_counter() of the read that brought it

_DONE = b"[DONE]"
_MAX_ERROR_BYTES = 64 * 1024


class HttpStatusError(Exception):
    """The server answered with another status than 200; in OpenAI's error body if it has one."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {_error_message(body)}")
        self.status = status


class NoAnswer(Exception):
    """No connection, one that ended before the answer did, or no end of the answer in time."""


class EventParser:
    """Cuts a byte stream into the data of server-sent events, however the bytes are split."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class _Response(asyncio.Protocol):
    """Reads one response after another; `expect` starts the next one."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._done: asyncio.Future[tuple[int, bytes]] | None = None
        self._on_event: OnEvent | None = None
        self.can_reuse = False

    def expect(self, on_event: OnEvent | None) -> asyncio.Future[tuple[int, bytes]]:
        """Resolves to (status, body); the body of a streamed 200 is given to `on_event` instead."""
        self._parser = httptools.HttpResponseParser(self)
        self._events = EventParser()
        self._on_event = on_event
        self._body: list[bytes] = []
        self._read_at = 0.0
        self.can_reuse = False
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._read_at = time.perf_counter()
        if self._done is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(NoAnswer(f"not an HTTP answer: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(NoAnswer(f"connection ended before the answer did{f': {error}' if error else ''}"))

    def on_body(self, data: bytes) -> None:
        if self._on_event is None or self._parser.get_status_code() != 200:
            self._body.append(data)
            return
        for event in self._events.feed(data):
            if event != _DONE:
                self._on_event(event, self._read_at)

    def on_message_complete(self) -> None:
        self.can_reuse = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result((self._parser.get_status_code(), b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        self.can_reuse = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None  # beside the system's CAs (and that of SSL_CERT_FILE)

    def __str__(self) -> str:
        return self.url


class HttpClient:
    """One connection to a server, reopened when needed. Closing it cancels the request."""

    def __init__(self, server: Server | str) -> None:
        """ValueError for what is not a URL, or a CA file that cannot be read."""
        self._server = server if isinstance(server, Server) else Server(server)
        url = self._server.url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of the form http://host:port")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _tls_context(self._server.ca_file) if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        self._response: _Response | None = None

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._response is not None and self._response.transport is not None:
            self._response.transport.abort()
        self._response = None

    async def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
        return await self._exchange("GET", path, None, None, timeout_s)

    async def get_json(self, path: str, timeout_s: float = 10.0) -> Any:
        status, body = await self.get(path, timeout_s)
        if status != 200:
            raise HttpStatusError(status, body)
        return orjson.loads(body)

    async def post_stream(self, path: str, payload: bytes, on_event: OnEvent, timeout_s: float) -> None:
        """Returns after the last event. Raises HttpStatusError, NoAnswer."""
        status, body = await self._exchange("POST", path, payload, on_event, timeout_s)
        if status != 200:
            raise HttpStatusError(status, body)

    async def _exchange(
        self, method: str, path: str, payload: bytes | None, on_event: OnEvent | None, timeout_s: float
    ) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._connected()
                done = response.expect(on_event)
                assert response.transport is not None
                response.transport.write(self._head(method, path, payload) + (payload or b""))
                return await done
        except TimeoutError as error:
            raise NoAnswer(f"no end of the answer after {timeout_s:.0f} s") from error
        finally:
            if self._response is not None and not self._response.can_reuse:
                self.close()

    async def _connected(self) -> _Response:
        if self._response is not None and self._response.transport is not None:
            if self._response.can_reuse and not self._response.transport.is_closing():
                return self._response
            self.close()
        loop = asyncio.get_running_loop()
        try:
            _, self._response = await loop.create_connection(_Response, self._host, self._port, ssl=self._tls)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise NoAnswer(f"no server at {self._host}:{self._port} ({reason})") from error
        return self._response

    def _head(self, method: str, path: str, payload: bytes | None) -> bytes:
        head = f"{method} {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAccept: */*\r\n"
        if self._server.api_key:
            head += f"Authorization: Bearer {self._server.api_key}\r\n"
        if payload is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        return (head + "\r\n").encode()


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            raise ValueError(f"{ca_file}: {error}") from error
    return context


def _error_message(body: bytes) -> str:
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:_MAX_ERROR_BYTES].decode(errors="replace").strip()[:200] or "no reason given"
