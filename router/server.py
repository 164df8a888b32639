"""The HTTP server and how it ends: /ready turns 503, open requests finish within a grace time, then exit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from router.drain import Drain
from router.http_protocol import bounded_protocol
from router.settings import RouterSettings
from servicekit.lifecycle import drain_on_signals
from servicekit.logging import get_logger

log = get_logger(__name__)

_MAX_HEADER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    client_timeout_s: float = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None


class RouterServer(uvicorn.Server):
    """uvicorn, with our signals: the first one drains, the second one ends the process."""

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str,
        port: int,
        options: HttpOptions = HttpOptions(),
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            http=bounded_protocol(options.client_timeout_s),
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def bound_port(self) -> int:
        """Once started."""
        return int(self.servers[0].sockets[0].getsockname()[1])


async def serve(app: FastAPI) -> None:
    """Until a signal has been obeyed."""
    settings: RouterSettings = app.state.serving.settings
    drain: Drain = app.state.serving.drain
    servers = build_servers(app)
    with drain_on_signals() as drain_asked:
        serving = [asyncio.create_task(server.serve()) for server in servers]
        asked = asyncio.create_task(drain_asked.wait())
        await asyncio.wait({*serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not any(task.done() for task in serving):
            drain.begin()
            if not await drain.wait_idle(settings.drain_grace_s):
                log.warning("grace_period_over", num_open=drain.num_open, grace_s=settings.drain_grace_s)
        for server in servers:
            server.should_exit = True
        asked.cancel()
        await asyncio.gather(*serving)


def build_servers(app: FastAPI) -> list[RouterServer]:
    """The public one, and the one of the admin port if it has its own."""
    settings: RouterSettings = app.state.serving.settings
    options = HttpOptions(
        client_timeout_s=settings.client_timeout_s,
        tls_cert=settings.http_tls_cert,
        tls_key=settings.http_tls_key,
    )
    servers = [RouterServer(app, host=settings.host, port=settings.port, options=options)]
    if settings.admin_port is not None:
        admin_app: FastAPI = app.state.admin_app
        servers.append(
            RouterServer(admin_app, host=settings.admin_host, port=settings.admin_port, options=options)
        )
    return servers
