"""Tells the supervisor which processes serve: registered workers, and the router that answers /ready."""

from __future__ import annotations

import asyncio

from baton.http_client import HttpClient, NoAnswer, Server
from baton.up.supervisor import Supervisor
from kvstore.registry import Registry

_ROUTER_RETRY_S = 0.2  # an HTTP server cannot tell us that it listens; it is asked


async def watch_workers(supervisor: Supervisor, registry: Registry) -> None:
    """Until cancelled."""
    names = {status.spec.address: name for name, status in supervisor.statuses.items()}
    async for records in registry.watch():
        for record in records:
            if record.address in names and not record.is_draining:
                supervisor.mark_ready(names[record.address], record.incarnation)


async def watch_router(supervisor: Supervisor, server: Server) -> None:
    """Until cancelled."""
    router = supervisor.statuses["router"]
    while True:
        await supervisor.wait_until(lambda: router.state == "starting")
        if await _answers(server):
            supervisor.mark_ready("router")
        else:
            await asyncio.sleep(_ROUTER_RETRY_S)


async def _answers(server: Server) -> bool:
    async with HttpClient(server) as client:
        try:
            status, _ = await client.get("/ready", timeout_s=2.0)
        except NoAnswer:
            return False
    return status == 200
