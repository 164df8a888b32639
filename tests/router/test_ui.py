from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from kvstore.worker_record import WorkerLoad
from servicekit.metrics import MetricsServer, build_metrics_registry
from tests.fakes.fake_decode_worker import decode_record
from tests.router.conftest import Router, RouterFactory

KEY = {"authorization": "Bearer open sesame"}
LOCAL = "127.0.0.1:1"


@asynccontextmanager
async def events(router: Router, **headers: str) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
    async with router.client.stream("GET", "/ui/events", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")

        async def read() -> AsyncIterator[tuple[str, dict[str, Any]]]:
            name = ""
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

        async with aclosing(read()) as stream:
            yield stream


async def state_with(stream: AsyncIterator[tuple[str, dict[str, Any]]], key: str) -> dict[str, Any]:
    """The first state where `key` is not empty."""
    async with asyncio.timeout(20):
        async for name, data in stream:
            if name == "state" and data.get(key):
                return data
    raise AssertionError("the events ended")


def publisher_of(router: Router) -> Any:
    return router.app.state.ui_publishers["test"]


async def test_the_page_and_its_files_come_with_security_headers(router: Router) -> None:
    page = await router.client.get("/ui")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for response in (page, await router.client.get("/ui/main.js"), await router.client.get("/ui/style.css")):
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_the_page_names_nothing_of_another_host_and_holds_nothing_inline(router: Router) -> None:
    page = (await router.client.get("/ui")).text
    assert "http" not in page
    assert "style=" not in page and "<style" not in page and "onclick" not in page
    assert all("src=" in tag for tag in page.split("<script")[1:])


async def test_a_file_that_has_not_changed_is_not_sent_again(router: Router) -> None:
    first = await router.client.get("/ui/main.js")
    again = await router.client.get("/ui/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fendpoints.py", "%2e%2e%2faccess.py", "index.html", ""])
async def test_nothing_but_the_pages_own_files_is_served(router: Router, name: str) -> None:
    assert (await router.client.get(f"/ui/{name}")).status_code in (404, 307)


async def test_without_a_key_only_this_machine_under_its_own_name_is_answered(router: Router) -> None:
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert (await router.client.get("/ui", headers={"host": host})).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.7:8000"):
        for path in ("/ui", "/ui/main.js", "/ui/events"):
            refused = await router.client.get(path, headers={"host": host})
            assert refused.status_code == 403, (host, path)
            assert "admin_key" in refused.json()["error"]["message"]


async def test_without_a_key_a_client_behind_a_local_proxy_is_refused(router: Router) -> None:
    refused = await router.client.get("/ui/events", headers={"x-forwarded-for": "203.0.113.9"})
    assert refused.status_code == 403


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        "Basic open sesame",
        "open sesame",
        "Bearer open sesamf\u00e9",
    ],
)
async def test_with_a_key_the_data_needs_it(make_router: RouterFactory, header: str | None) -> None:
    router = await make_router(admin_key="open sesame")
    headers = {} if header is None else {"authorization": header.encode()}
    refused = await router.client.get("/ui/events", headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert (await router.client.get("/ui", headers={"host": "baton.example"})).status_code == 200


async def test_events_show_the_workers_and_the_ways_that_requests_take(make_router: RouterFactory) -> None:
    router = await make_router(admin_key="open sesame")
    await router.add_worker("decode-0", num_hit_tokens=1)
    async with events(router, **KEY) as stream:
        name, opening = await anext(stream)
        assert name == "opening"
        assert opening["model"] == "test"
        _, state = await anext(stream)
        assert state["is_ready"]
        [worker] = state["workers"]
        assert (worker["id"], worker["role"], worker["status"]) == ("decode-0", "decode", "ready")
        assert worker["tiers"]["device"]["total"] == 1000
        assert (await router.complete()).status_code == 200
        state = await state_with(stream, "legs")
    [leg] = state["legs"]
    assert (leg["prefill"], leg["decode"], leg["num_sequences"]) == ("", "decode-0", 1)
    assert leg["num_hit_tokens"] == 1
    low, high = state["latency"]["ttft"]
    assert 0 < low <= high
    assert state["rates"]["tokens_per_s"] > 0


async def test_a_draining_and_a_gone_worker_are_seen(router: Router) -> None:
    async with events(router) as stream:
        worker = router.workers["decode-0"]
        address = f"127.0.0.1:{worker.port}"
        await router.announce(decode_record("decode-0", address, is_draining=True))
        async with asyncio.timeout(10):
            async for name, data in stream:
                if name == "state" and data["workers"] and data["workers"][0]["status"] == "draining":
                    break
        await router.registry.withdraw("decode-0")
        async with asyncio.timeout(10):
            async for name, data in stream:
                if name == "state" and not data["workers"]:
                    break
    assert not data["is_ready"]


async def test_tiers_and_experts_come_from_the_workers_own_pages(router: Router) -> None:
    state = {"tiers": {"device": {"total": 9, "used": 4, "cached": 2}}, "experts": [[30, 10], [0, 0]]}
    server = MetricsServer(build_metrics_registry(), pages={"/state": lambda: state})
    metrics_address = f"127.0.0.1:{server.start()}"
    try:
        for index in range(2):
            record = decode_record(f"prefill-{index}", LOCAL, role="prefill", metrics_address=metrics_address)
            await router.announce(record)
        broken = decode_record("prefill-9", LOCAL, role="prefill", metrics_address="127.0.0.1:1")
        await router.announce(broken)
        async with events(router) as stream:
            seen = await state_with(stream, "experts")
    finally:
        server.stop()
    heat = seen["experts"]["prefill"]
    assert (heat["num_layers"], heat["num_experts"], heat["num_tokens"]) == (2, 2, 80)
    assert list(base64.b64decode(heat["cells"])) == [48, 16, 0, 0]
    tiers = {worker["id"]: worker["tiers"]["device"] for worker in seen["workers"]}
    assert tiers["prefill-0"] == {"total": 9, "used": 4, "cached": 2}
    assert tiers["prefill-9"]["total"] == 1000


async def test_nothing_runs_when_nobody_looks(router: Router) -> None:
    publisher = publisher_of(router)
    activity = router.app.state.serving.metrics.of("test").activity
    assert not publisher.is_running
    async with events(router) as first, events(router) as second:
        await anext(first)
        await anext(second)
        assert publisher.num_viewers == 2
        assert activity.is_watched
    await router.complete()
    async with asyncio.timeout(10):
        while publisher.is_running or activity.is_watched:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # until the server sees that the viewers' sockets are closed
    await router.complete()
    assert activity.take() == ([], [], {})
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("ui ")]


async def test_there_are_no_more_viewers_than_the_limit(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.ui.endpoints.MAX_VIEWERS", 1)
    async with events(router) as stream:
        await anext(stream)
        refused = await router.client.get("/ui/events")
    assert refused.status_code == 503
    assert refused.headers["retry-after"]


async def test_viewers_are_sent_home_when_the_router_has_drained(router: Router) -> None:
    async with events(router) as stream, asyncio.timeout(10):
        await anext(stream)
        router.app.state.serving.drain.begin()
        with pytest.raises(StopAsyncIteration):
            while True:
                await anext(stream)


async def test_many_workers_are_bounded(router: Router) -> None:
    for index in range(300):
        record = decode_record(f"prefill-{index:03}", LOCAL, role="prefill", load=WorkerLoad(num_running=1))
        await router.announce(record)
    async with events(router) as stream:
        async with asyncio.timeout(20):
            async for name, data in stream:
                if name == "state" and data["num_workers"] == 301:
                    break
    assert len(data["workers"]) == 256
    assert len(json.dumps(data)) < 200_000


async def test_the_key_is_never_shown(make_router: RouterFactory, caplog: pytest.LogCaptureFixture) -> None:
    router = await make_router(admin_key="open sesame")
    async with events(router, **KEY) as stream:
        await anext(stream)
    await router.client.get("/ui/events", headers={"authorization": "Bearer nearly open sesame"})
    assert "sesame" not in caplog.text
