"""HTTP connections with patience: a client that does not send, or does not read, is cut off.

uvicorn bounds only the pause between two requests. Without these limits anybody could hold a connection, a
running sequence and its buffers for ever by doing nothing. Costs nothing per token: the clock runs only while
a client is waited for.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from servicekit.logging import get_logger

log = get_logger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """Of one connection."""

    client_timeout_s = 30.0  # for the headers of a request, and for reading what was written
    _headers_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._headers_timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._stop_headers_timer()
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
