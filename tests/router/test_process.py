"""`python -m router` as a process, with a real registry."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from kvstore.embedded import EmbeddedServer
from kvstore.registry import RedisRegistry
from kvstore.store import Store
from tests.fakes.fake_decode_worker import FakeDecodeWorker, decode_record, mixing_script


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@asynccontextmanager
async def router_process(
    model_dir: Path, redis_url: str, port: object = 0, **settings: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    values = {
        "model": model_dir,
        "served_model_name": "test",
        "port": port,
        "redis_url": redis_url,
        **settings,
    }
    environment = {f"BATON_ROUTER_{name.upper()}": str(value) for name, value in values.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", env={**os.environ, **environment}, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def wait_for_ready_status(client: httpx.AsyncClient, status: int) -> httpx.Response:
    for _ in range(600):
        try:
            response = await client.get("/ready")
            if response.status_code == status:
                return response
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)  # a process can only be asked
    raise AssertionError(f"/ready did not become {status}")


async def test_sigterm_finishes_open_streams_refuses_new_requests_and_exits_cleanly(
    model_dir: Path, port: int
) -> None:
    server = EmbeddedServer()
    redis_url = server.start()
    store = Store(redis_url)
    worker = FakeDecodeWorker(mixing_script(300), hold_after=3)
    record = decode_record("decode-0", await worker.start())
    await RedisRegistry(store, "test").announce(record, 60.0)
    url = f"http://127.0.0.1:{port}"
    body = {"model": "test", "prompt": "hello", "max_tokens": 6, "ignore_eos": True, "stream": True}
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client,
            router_process(model_dir, redis_url, port) as process,
        ):
            await wait_for_ready_status(client, 200)
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                process.send_signal(signal.SIGTERM)
                ready = await wait_for_ready_status(client, 503)
                assert ready.json() == {"status": "draining"}
                assert (await client.post("/v1/completions", json=body)).status_code == 503
                await worker.release()
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert await process.wait() == 0
    finally:
        await worker.kill()
        await store.close()
        server.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": "many"}, "BATON_ROUTER_PORT='many': must be a whole number"),
        ({"model": "/nowhere"}, "model directory /nowhere does not exist"),
        ({"redis_url": "carrier-pigeon://x"}, "Redis URL"),
    ],
)
async def test_a_mistake_gets_one_clear_line_and_code_2(
    model_dir: Path, settings: dict[str, object], message: str
) -> None:
    url = str(settings.get("redis_url", "redis://127.0.0.1:1"))
    others = {name: value for name, value in settings.items() if name != "redis_url"}
    async with router_process(model_dir, url, **others) as process:
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert len(errors.decode().splitlines()) == 1, errors.decode()
    assert message in errors.decode()
