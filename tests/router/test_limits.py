"""What a client may take of this router: room, time, and its patience."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from router.exposure import warn_if_open
from router.server import build_servers
from router.settings import RouterSettings
from tests.fakes.fake_decode_worker import FakeDecodeWorker
from tests.router.conftest import Router, RouterFactory, eventually


async def connect(router: Router) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", router.port)


def raw_request(body: dict[str, object]) -> bytes:
    data = json.dumps({"model": "test", **body}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: r\r\n"])
async def test_a_client_that_does_not_finish_its_headers_is_cut_off(
    make_router: RouterFactory, sent: bytes
) -> None:
    router = await make_router(client_timeout_s=0.2)
    reader, writer = await connect(router)
    writer.write(sent)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        async with asyncio.timeout(10):
            if await reader.read() == b"":
                raise ConnectionResetError
    writer.close()


async def test_slow_headers_of_a_second_request_are_cut_off_too(make_router: RouterFactory) -> None:
    router = await make_router(client_timeout_s=0.3)
    reader, writer = await connect(router)
    writer.write(b"GET /health HTTP/1.1\r\nhost: r\r\n\r\nGET /hea")
    async with asyncio.timeout(10):
        assert b"200 OK" in await reader.readuntil(b'"ok"}')
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
    writer.close()


async def test_a_client_that_does_not_finish_its_body_gets_408(make_router: RouterFactory) -> None:
    router = await make_router(client_timeout_s=0.2)
    reader, writer = await connect(router)
    writer.write(raw_request({"prompt": "hello"})[:-5])
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n")
        assert b" 408 " in head
    writer.close()


async def test_a_reader_that_does_not_read_is_cut_off_and_its_request_cancelled(
    make_router: RouterFactory,
) -> None:
    router = await make_router(client_timeout_s=0.3)
    worker = await router.add_worker("decode-0", tokens_per_update=400)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", router.port))
    _, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    asked = {"prompt": [[5] * 100] * 16, "n": 8, "max_tokens": 400, "ignore_eos": True, "stream": True}
    writer.write(raw_request({**asked, "logprobs": 5}))  # more than all buffers of the kernel hold
    serving = router.app.state.serving

    async def is_over() -> bool:
        return bool(worker.submits) and not serving.drain.num_open

    await eventually(is_over, 20.0)
    assert (
        await router.metric('baton_router_requests_total{endpoint="completions",outcome="disconnected"}') == 1
    )
    writer.transport.abort()


async def test_a_slow_reader_that_does_read_keeps_its_stream(make_router: RouterFactory) -> None:
    router = await make_router(client_timeout_s=0.5)
    await router.add_worker("decode-0", step_s=0.05)
    body = {"model": "test", "prompt": "hello", "max_tokens": 30, "ignore_eos": True, "stream": True}
    async with router.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"  # 1.5 s: longer than any time limit of the client's


async def test_requests_beyond_the_limit_are_refused_and_leave_when_there_is_room(
    make_router: RouterFactory,
) -> None:
    router = await make_router(max_concurrent_requests=2)
    worker: FakeDecodeWorker = await router.add_worker("decode-0", is_held=True)
    held = [asyncio.create_task(router.complete()) for _ in range(2)]
    await worker.until(lambda: len(worker.submits) == 2)
    refused = await router.complete()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert (await router.client.get("/health")).status_code == 200
    await worker.release()
    assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
    assert (await router.complete()).status_code == 200


async def test_a_prompt_longer_than_allowed_is_refused(make_router: RouterFactory) -> None:
    router = await make_router(max_prompt_tokens=4)
    await router.add_worker("decode-0")
    assert (await router.complete(prompt=[5] * 4)).status_code == 200
    refused = await router.complete(prompt=[[5], [5] * 5])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
async def test_a_senseless_time_limit_is_a_clear_error(router: Router, value: str) -> None:
    response = await router.client.post(
        "/v1/completions", json={"prompt": "hello"}, headers={"x-request-timeout": value}
    )
    assert response.status_code == 400
    assert "x-request-timeout" in response.json()["error"]["message"]


async def test_the_client_s_time_limit_reaches_the_worker(router: Router, worker: FakeDecodeWorker) -> None:
    body = {"model": "test", "prompt": "hello", "max_tokens": 1}
    await router.client.post("/v1/completions", json=body, headers={"x-request-timeout": "7.5"})
    assert 0 < worker.submits[0].sequence.time_left_s <= 7.5


async def test_browsers_of_other_sites_are_not_served_unless_named(make_router: RouterFactory) -> None:
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = await make_router()
    response = await closed.client.options("/v1/models", headers=asks)
    assert "access-control-allow-origin" not in response.headers
    opened = await make_router(cors_origins="https://app.example, https://b.example")
    response = await opened.client.options("/v1/models", headers=asks)
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    stranger = await opened.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


@asynccontextmanager
async def admin_client(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    """Of a router with admin_port=0."""
    _, admin = build_servers(router.app)
    serving = asyncio.create_task(admin.serve())

    async def is_started() -> bool:
        return admin.started

    await eventually(is_started)
    try:
        url = f"http://127.0.0.1:{admin.bound_port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield client
    finally:
        admin.should_exit = True
        await serving


async def test_with_an_admin_port_metrics_and_page_are_only_there(make_router: RouterFactory) -> None:
    router = await make_router(admin_port=0)
    async with admin_client(router) as client:
        for path in ("/metrics", "/ui"):
            assert (await client.get(path)).status_code == 200
            assert (await router.client.get(path)).status_code == 404
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 404


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


async def test_the_playground_on_an_admin_port_is_for_those_who_may_see_the_page(
    make_router: RouterFactory,
) -> None:
    router = await make_router(admin_port=0)
    await router.add_worker("decode-0")
    async with admin_client(router) as client:
        for headers, status in (({}, 200), ({"host": "evil.example"}, 403)):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == status, answer.text
        from_elsewhere = await client.post(
            "/v1/chat/completions", json=CHAT, headers={"origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in from_elsewhere.headers


async def test_the_playground_on_an_admin_port_asks_for_the_admin_key(make_router: RouterFactory) -> None:
    router = await make_router(admin_port=0, admin_key="open sesame")
    await router.add_worker("decode-0")
    async with admin_client(router) as client:
        for key, status in ((None, 401), ("wrong", 401), ("open sesame", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == status, answer.text
    assert len(router.workers["decode-0"].submits) == 1


@pytest.mark.parametrize(
    ("settings", "events"),
    [
        ({}, []),
        ({"host": "::1"}, []),
        ({"host": "0.0.0.0"}, ["open_to_everybody"]),
        ({"host": "0.0.0.0", "require_api_key": True}, ["api_keys_travel_in_the_clear"]),
        ({"host": "gpu-7", "require_api_key": True, "http_tls_cert": "c", "http_tls_key": "k"}, []),
    ],
)
def test_a_router_that_strangers_reach_says_so(
    caplog: pytest.LogCaptureFixture, settings: dict[str, object], events: list[str]
) -> None:
    warn_if_open(RouterSettings(model="m", **settings))  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == events
