"""A client that goes away frees its work in every state."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.fakes.fake_decode_worker import FakeDecodeWorker
from tests.router.conftest import Router, RouterFactory


class RawClient:
    """A socket that can be closed at any byte."""

    def __init__(self, router: Router) -> None:
        self._port = router.port

    async def post(self, path: str, body: dict[str, object], *, num_body_bytes: int | None = None) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: router\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        self.writer.write(head + raw[:num_body_bytes])
        await self.writer.drain()

    async def leave(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


def body(**fields: object) -> dict[str, object]:
    return {"model": "test", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, **fields}


async def assert_nothing_is_left(router: Router) -> None:
    assert await router.app.state.serving.drain.wait_idle(10.0)
    assert all(link.num_streams == 0 for _, link in router.fleet.decode_workers())
    loads = [link.own for _, link in router.fleet.decode_workers()]
    assert {(own.num_requests, own.num_tokens) for own in loads} == {(0, 0)}
    assert await router.metric("baton_router_requests_in_flight") == 0
    assert (await router.complete()).status_code == 200


async def assert_counted_as_disconnected(router: Router, num: int = 1) -> None:
    name = 'baton_router_requests_total{endpoint="completions",outcome="disconnected"}'
    assert await router.metric(name) == num


@pytest.mark.parametrize("stream", [False, True])
async def test_while_waiting_for_the_first_token(
    router: Router, worker: FakeDecodeWorker, stream: bool
) -> None:
    worker.is_held = True
    client = RawClient(router)
    await client.post("/v1/completions", body(stream=stream))
    await worker.until(lambda: len(worker.submits) == 1)
    await client.leave()
    await worker.until(lambda: bool(worker.cancelled) and not worker.active)
    await worker.release()
    await assert_nothing_is_left(router)
    await assert_counted_as_disconnected(router)


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(router: Router, worker: FakeDecodeWorker, n: int) -> None:
    worker.hold_after = 5
    client = RawClient(router)
    await client.post("/v1/completions", body(stream=True, n=n))
    await client.reader.readuntil(b"data: ")
    await client.leave()
    await worker.until(lambda: len(worker.cancelled) == n and not worker.active)
    await worker.release()
    await assert_nothing_is_left(router)


async def test_in_the_middle_of_an_answer_that_is_not_streamed(
    router: Router, worker: FakeDecodeWorker
) -> None:
    worker.hold_after = 5
    client = RawClient(router)
    await client.post("/v1/completions", body())
    await worker.until(lambda: len(worker.submits) == 1)
    await client.leave()
    await worker.until(lambda: bool(worker.cancelled) and not worker.active)
    await worker.release()
    await assert_nothing_is_left(router)


async def test_while_sending_its_body(router: Router, worker: FakeDecodeWorker) -> None:
    client = RawClient(router)
    await client.post("/v1/completions", body(), num_body_bytes=10)
    await client.leave()
    await assert_nothing_is_left(router)
    assert len(worker.submits) == 1  # of the request that checked


async def test_while_no_worker_is_there(make_router: RouterFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    router = await make_router()
    waits = asyncio.Event()
    wait_for_change = router.fleet.wait_for_change

    async def noted(timeout_s: float) -> bool:
        waits.set()
        return bool(await wait_for_change(timeout_s))

    monkeypatch.setattr(router.fleet, "wait_for_change", noted)
    client = RawClient(router)
    await client.post("/v1/completions", body())
    await waits.wait()
    await client.leave()
    assert await router.app.state.serving.drain.wait_idle(4.0)
    worker = await router.add_worker("decode-0")
    await assert_nothing_is_left(router)
    assert len(worker.submits) == 1


async def test_while_the_sequence_waits_to_migrate(make_router: RouterFactory) -> None:
    router = await make_router()
    first = await router.add_worker("decode-0", hold_after=5)
    client = RawClient(router)
    await client.post("/v1/completions", body(stream=True))
    await client.reader.readuntil(b"data: ")
    await first.kill()
    await router.until(lambda: router.linked() == [])
    await client.leave()
    assert await router.app.state.serving.drain.wait_idle(4.0)
    second = await router.add_worker("decode-1")
    await assert_nothing_is_left(router)
    assert len(second.submits) == 1


async def test_many_clients_that_leave_at_once_leave_nothing_behind(
    router: Router, worker: FakeDecodeWorker
) -> None:
    worker.step_s = 0.001
    clients = [RawClient(router) for _ in range(30)]
    for client in clients:
        await client.post("/v1/completions", body(stream=True))
    await worker.until(lambda: len(worker.submits) == 30)
    await asyncio.gather(*(client.leave() for client in clients))
    await worker.until(lambda: not worker.active)
    await assert_nothing_is_left(router)
    await assert_counted_as_disconnected(router, 30)
