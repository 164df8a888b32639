from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kvstore.memory_index import MemoryIndex
from kvstore.memory_registry import MemoryRegistry
from kvstore.worker_record import WorkerLoad, WorkerRecord
from router.app import build
from router.server import build_servers
from router.settings import RouterSettings
from tests.fakes.fake_decode_worker import FakeDecodeWorker, decode_record, mixing_script
from tests.fakes.tiny_tokenizer import write_model_dir

_LEASE_S = 3600.0  # nobody renews it, and a module's tests may share a router for minutes


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"))


@dataclass
class Router:
    """The real application on a real socket, over fake decode workers."""

    app: FastAPI
    client: httpx.AsyncClient
    registry: MemoryRegistry
    index: MemoryIndex
    port: int
    workers: dict[str, FakeDecodeWorker] = field(default_factory=dict)

    @property
    def fleet(self) -> Any:
        return self.app.state.serving.fleet

    async def add_worker(
        self, worker_id: str, *, load: WorkerLoad | None = None, max_model_len: int = 512, **fields: Any
    ) -> FakeDecodeWorker:
        """Started, registered and linked."""
        worker = FakeDecodeWorker(**{"script": mixing_script(300), **fields})
        self.workers[worker_id] = worker
        address = await worker.start()
        record = decode_record(worker_id, address, max_model_len=max_model_len, load=load or WorkerLoad())
        await self.announce(record)
        await self.until(lambda: worker_id in self.linked())
        return worker

    async def announce(self, record: WorkerRecord) -> None:
        await self.registry.announce(record, _LEASE_S)

    def linked(self) -> list[str]:
        return [record.worker_id for record, _ in self.fleet.decode_workers()]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert await self.fleet.wait_for_change(10.0), "the fleet did not change"

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "test", "prompt": "hello world", "max_tokens": 8, **fields}
        return await self.client.post("/v1/completions", json=body)

    async def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"model": "test", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def metric(self, name: str) -> float:
        page = (await self.client.get("/metrics")).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """For what only asking can tell."""
    for _ in range(int(timeout_s / 0.05)):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come true")


@asynccontextmanager
async def running_router(
    model_dir: Path, like: Router | None = None, **settings: Any
) -> AsyncIterator[Router]:
    """`like`: another one, whose registry and index this one follows too."""
    registry, index = (like.registry, like.index) if like else (MemoryRegistry(), MemoryIndex())
    defaults = {"model": model_dir, "served_model_name": "test", "port": 0, "worker_timeout_s": 5.0}
    router_settings = RouterSettings(**{**defaults, **settings})
    app = build(router_settings, registry=registry, index=index)
    server = build_servers(app)[0]
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.001)
    async with AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{server.bound_port}"
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=30, verify=False, trust_env=False)
        )
        router = Router(app, client, registry, index, server.bound_port)
        try:
            yield router
        finally:
            for worker in router.workers.values():
                await worker.kill()
            server.should_exit = True
            await serving


RouterFactory = Callable[..., Awaitable[Router]]


@pytest.fixture
async def make_router(model_dir: Path) -> AsyncIterator[RouterFactory]:
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> Router:
            return await stack.enter_async_context(running_router(model_dir, **settings))

        yield make


@pytest.fixture
async def router(make_router: RouterFactory) -> Router:
    """With one decode worker."""
    router = await make_router()
    await router.add_worker("decode-0")
    return router


@pytest.fixture
def worker(router: Router) -> FakeDecodeWorker:
    return router.workers["decode-0"]
