"""The HTTP server and how it ends: /ready turns 503, open requests finish within a grace time, then exit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from router.drain import Drain
from servicekit.lifecycle import drain_on_signals
from servicekit.logging import get_logger

log = get_logger(__name__)

_MAX_HEADER_BYTES = 64 << 10


class RouterServer(uvicorn.Server):
    """uvicorn, with our signals: the first one drains, the second one ends the process."""

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            http="httptools",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def bound_port(self) -> int:
        """Once started."""
        return int(self.servers[0].sockets[0].getsockname()[1])


async def serve(app: FastAPI, *, host: str, port: int, drain_grace_s: float) -> None:
    """Until a signal has been obeyed."""
    drain: Drain = app.state.serving.drain
    server = RouterServer(app, host=host, port=port)
    with drain_on_signals() as drain_asked:
        serving = asyncio.create_task(server.serve())
        asked = asyncio.create_task(drain_asked.wait())
        await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            drain.begin()
            if not await drain.wait_idle(drain_grace_s):
                log.warning("grace_period_over", num_open=drain.num_open, grace_s=drain_grace_s)
            server.should_exit = True
        asked.cancel()
        await serving
