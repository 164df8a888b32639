"""HTTP connections with patience: a client that does not send, or does not read, is cut off.

uvicorn bounds only the pause between two requests. Without these limits anybody could hold a connection, a
running sequence and its buffers for ever by doing nothing. Costs nothing per token: the clock runs only while
a client is waited for.
"""

from __future__ import annotations

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from servicekit.logging import get_logger

log = get_logger(__name__)

_STREAM_WRITER = "baton.stream_writer"  # an extension of ASGI's scope


class StreamWriter:
    """Sends pieces of a body at once, between its start and its end, which go through ASGI's send().

    That one is a coroutine, wrapped by every layer: for one token more work than all the rest.
    """

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    @property
    def is_ready(self) -> bool:
        """False: the client reads too slowly, or has gone."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, piece: bytes) -> None:
        """`piece` is not empty. One chunk of a body whose length the headers do not tell."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def stream_writer(scope: Scope) -> StreamWriter | None:
    """Of this request's connection; None under other servers than router/server.py."""
    extension = scope.get("extensions", {}).get(_STREAM_WRITER)
    writer: StreamWriter | None = extension["writer"] if extension else None
    return writer


class BoundedProtocol(HttpToolsProtocol):
    """Of one connection."""

    client_timeout_s = 30.0  # for the headers of a request, and for reading what was written
    _headers_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stream_writer = StreamWriter(self.transport, self.flow)
        self._await_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._headers_timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._stop_headers_timer()
        self.scope["extensions"] = {_STREAM_WRITER: {"writer": self._stream_writer}}
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_reader_timer()
        self._reader_timer = self.loop.call_later(self.client_timeout_s, self._cut_off, "slow_reader_cut_off")

    def resume_writing(self) -> None:
        self._stop_reader_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_headers_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._headers_timer = self.loop.call_later(
            self.client_timeout_s, self._cut_off, "slow_sender_cut_off"
        )

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _cut_off(self, event: str) -> None:
        log.info(event, timeout_s=self.client_timeout_s)
        self.transport.abort()


def bounded_protocol(client_timeout_s: float) -> type[BoundedProtocol]:
    """The class that uvicorn makes connections of."""
    return type("BoundedProtocol", (BoundedProtocol,), {"client_timeout_s": client_timeout_s})
