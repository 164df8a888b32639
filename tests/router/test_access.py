"""Who gets in, whose blocks they share, and how much they may use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest

from kvstore.api_keys import ApiKey, RedisApiKeys, digest_of, new_secret
from kvstore.block_hash import HashChain
from kvstore.embedded import EmbeddedServer
from kvstore.store import Store
from router.caller import secret_of
from router.endpoint import ENDPOINTS, Endpoint
from router.token_endpoints import TOKEN_BODIES
from tests.fakes.redis_server import flush_all, redis_server
from tests.router.conftest import Router, RouterFactory, eventually
from tests.router.test_limits import admin_client

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[tuple[EmbeddedServer, str]]:
    with redis_server() as pair:
        yield pair


@pytest.fixture
def redis(shared_redis: tuple[EmbeddedServer, str]) -> tuple[EmbeddedServer, str]:
    """Running and empty: a test may have stopped it."""
    server, url = shared_redis
    if not server.is_running():
        assert server.start() == url
    flush_all(url)
    return server, url


@dataclass
class Locked:
    """A router that asks for keys, with one decode worker."""

    router: Router
    keys: RedisApiKeys
    redis: EmbeddedServer

    async def key(self, name: str = "ada", **fields: Any) -> dict[str, str]:
        """The headers of a new key."""
        secret = new_secret()
        await self.keys.create(ApiKey(name=name, digest=digest_of(secret), **{"tenant": name, **fields}))
        return {"authorization": f"Bearer {secret}"}

    async def ask(self, headers: dict[str, str], **fields: Any) -> httpx.Response:
        body = {"model": "test", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, **fields}
        return await self.router.client.post("/v1/completions", json=body, headers=headers)


@pytest.fixture
async def locked(make_router: RouterFactory, redis: tuple[EmbeddedServer, str]) -> AsyncIterator[Locked]:
    server, url = redis
    router = await make_router(require_api_key=True, redis_url=url, admin_key="admin")
    await router.add_worker("decode-0")
    store = Store(url)
    yield Locked(router, RedisApiKeys(store), server)
    await store.close()


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer baton-guess"}, {"authorization": "Basic eDp5"}, {"x-api-key": "guess"}],
)
async def test_strangers_get_401_and_no_worker_hears_of_it(locked: Locked, headers: dict[str, str]) -> None:
    response = await locked.ask(headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key" and error["type"] == "invalid_request_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert locked.router.workers["decode-0"].submits == []


@pytest.mark.parametrize(
    "path", ["/v1/models", "/load", "/tokenizer_info", "/openapi.json", "/docs", "/version", "/nothing"]
)
async def test_a_stranger_gets_nothing_else_either(locked: Locked, path: str) -> None:
    assert (await locked.router.client.get(path)).status_code == 401


async def test_probes_need_no_key_and_metrics_the_admin_s(locked: Locked) -> None:
    client = locked.router.client
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 200
    headers = await locked.key()
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers=headers)).status_code == 403
    page = await client.get("/metrics", headers={"authorization": "Bearer admin"})
    assert page.status_code == 200
    assert 'baton_router_refused_total{reason="no_key"}' in page.text


async def test_both_ways_to_send_a_key_work(locked: Locked) -> None:
    headers = await locked.key()
    assert (await locked.ask(headers)).status_code == 200
    assert (await locked.ask({"x-api-key": headers["authorization"].split()[1]})).status_code == 200


_OF_MODELS: list[tuple[str, str, dict[str, Any] | None]] = [
    *(("POST", endpoint.path, None) for endpoint in ENDPOINTS),
    ("POST", "/tokenize", {"prompt": "hi"}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models/test", None),
]
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize(("method", "path", "body"), _OF_MODELS)
async def test_a_key_that_may_not_use_a_model_gets_403(
    locked: Locked, method: str, path: str, body: dict[str, Any] | None
) -> None:
    elsewhere, here = (
        await locked.key("eve", models=("other",)),
        await locked.key("ada", models=("x", "test")),
    )
    body = _BODIES.get(path) or body
    for name in ("test", None):
        named = None if body is None else {**body, **({"model": name} if name else {})}
        refused = await locked.router.client.request(method, path, json=named, headers=elsewhere)
        assert refused.status_code == 403, refused.text
        error = refused.json()["error"]
        assert error["type"] == "permission_error" and "may not use the model 'test'" in error["message"]
        assert refused.headers.get("www-authenticate") is None
        served = await locked.router.client.request(method, path, json=named, headers=here)
        assert served.status_code == 200, served.text
    assert len(locked.router.workers["decode-0"].submits) == (2 if path in _BODIES else 0)


async def test_a_key_sees_the_models_that_it_may_use(locked: Locked) -> None:
    async def seen(**fields: Any) -> list[str]:
        headers = await locked.key(name=str(fields), **fields)
        page = await locked.router.client.get("/v1/models", headers=headers)
        return [model["id"] for model in page.json()["data"]]

    assert await seen() == await seen(models=("test",)) == ["test"]
    assert await seen(models=("other",)) == []
    nobody = await locked.ask(await locked.key("eve", models=("other",)), model="third")
    assert nobody.status_code == 404 and nobody.json()["error"]["code"] == "model_not_found"


async def test_clients_know_a_refusal_of_permission(locked: Locked) -> None:
    secret = (await locked.key(models=("other",)))["authorization"].split()[1]
    url = str(locked.router.client.base_url)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError, match="may not use"):
            await client.completions.create(model="test", prompt="hi")
    async with anthropic.AsyncAnthropic(base_url=url, api_key=secret, max_retries=0) as client:
        with pytest.raises(anthropic.PermissionDeniedError, match="may not use"):
            await client.messages.create(
                model="test", max_tokens=4, messages=[{"role": "user", "content": "hi"}]
            )
    page = await locked.router.client.get("/metrics", headers={"authorization": "Bearer admin"})
    assert 'baton_router_refused_total{reason="not_allowed"} 2.0' in page.text


async def test_the_playground_on_an_admin_port_asks_for_an_api_key_when_the_public_one_does(
    make_router: RouterFactory, redis: tuple[EmbeddedServer, str]
) -> None:
    router = await make_router(require_api_key=True, redis_url=redis[1], admin_key="admin", admin_port=0)
    await router.add_worker("decode-0")
    store = Store(redis[1])
    headers = await Locked(router, RedisApiKeys(store), redis[0]).key()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    async with admin_client(router) as client:
        for shown, status in ((headers, 200), ({"authorization": "Bearer admin"}, 401), ({}, 401)):
            answer = await client.post("/v1/chat/completions", json=body, headers=shown)
            assert answer.status_code == status, answer.text
        assert (await client.get("/metrics", headers=headers)).status_code == 200  # the network guards it
    await store.close()


@pytest.mark.parametrize("path", ["/metrics", "/ui/events"])
async def test_an_api_key_is_no_admin_key(locked: Locked, path: str) -> None:
    client = locked.router.client
    refused = await client.get(path, headers=await locked.key())
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    for stranger in ({}, {"authorization": "Bearer baton-guess"}):
        assert (await client.get(path, headers=stranger)).status_code == 401


@pytest.mark.parametrize(
    ("priority", "asked", "told"),
    [
        ("normal", None, 0),
        ("normal", -5, 0),
        ("normal", 7, 7),
        ("high", None, -100),
        ("high", -(2**31), -100),
        ("high", -5, -5),
        ("low", None, 100),
        ("low", 0, 100),
        ("low", 101, 101),
    ],
)
async def test_nobody_gets_before_others_than_his_key_allows(
    locked: Locked, priority: str, asked: int | None, told: int
) -> None:
    headers = await locked.key(priority=priority)
    assert (await locked.ask(headers, priority=asked)).status_code == 200
    assert locked.router.workers["decode-0"].submits[0].sequence.priority == told


async def test_without_keys_nobody_gets_before_those_who_ask_for_nothing(router: Router) -> None:
    worker = router.workers["decode-0"]
    for asked in (-3, 0, 3, None):
        assert (await router.chat(priority=asked)).status_code == 200
    assert [submit.sequence.priority for submit in worker.submits] == [0, 0, 3, 0]
    assert (await router.chat(priority=2**31)).status_code == 400


@pytest.mark.parametrize("path", [*(endpoint.path for endpoint in ENDPOINTS), *TOKEN_BODIES])
async def test_every_endpoint_refuses_strangers_in_its_own_words(locked: Locked, path: str) -> None:
    response = await locked.router.client.post(path, json={}, headers={"x-api-key": "guess"})
    assert response.status_code == 401
    if path.startswith("/v1/messages"):
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "authentication_error"
    else:
        assert response.json()["error"]["code"] == "invalid_api_key"


CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "max_tokens": 4},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    "/v1/messages": {**CHAT, "max_tokens": 4},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
@pytest.mark.parametrize("streams", [False, True])
async def test_tenant_and_quota_hold_at_every_endpoint(
    locked: Locked, endpoint: Endpoint, streams: bool
) -> None:
    headers = await locked.key(tenant="engines", requests_per_minute=1)
    body = {"model": "test", "stream": streams, **BODIES[endpoint.path]}
    response = await locked.router.client.post(endpoint.path, json=body, headers=headers)
    assert response.status_code == 200
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert response.headers["x-baton-route"].startswith("decode=decode-0")
    [submit] = locked.router.workers["decode-0"].submits
    assert submit.sequence.tenant == "engines"

    refused = await locked.router.client.post(endpoint.path, json=body, headers=headers)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert ("type" in refused.json()) == (endpoint.path == "/v1/messages")  # Anthropic's form


async def test_a_revoked_key_ends_within_seconds(locked: Locked) -> None:
    headers = await locked.key()
    assert (await locked.ask(headers)).status_code == 200
    await locked.keys.revoke("ada")

    async def is_refused() -> bool:
        return (await locked.ask(headers)).status_code == 401

    await eventually(is_refused, 5.0)


async def test_an_expired_key_is_refused(locked: Locked) -> None:
    response = await locked.ask(await locked.key(expires_at=1.0))
    assert response.status_code == 401
    assert "expired" in response.json()["error"]["message"]


async def test_redis_away_known_keys_go_on_and_others_hear_503(locked: Locked) -> None:
    headers = await locked.key()
    assert (await locked.ask(headers)).status_code == 200
    locked.redis.kill()
    assert (await locked.ask(headers)).status_code == 200
    response = await locked.ask({"x-api-key": "unknown"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_the_tenant_of_the_key_reaches_the_worker(locked: Locked) -> None:
    await locked.ask(await locked.key("ada", tenant="engines"))
    await locked.ask(await locked.key("bob"))
    submits = locked.router.workers["decode-0"].submits
    assert [submit.sequence.tenant for submit in submits] == ["engines", "bob"]


async def test_hits_are_looked_up_in_the_blocks_of_the_own_tenant(locked: Locked) -> None:
    """The index knows the prompt's block as one of ada's: only she is routed by it."""
    chain = HashChain(model_fingerprint="weights", block_size=4)
    locked.router.index.publish("decode-0", chain.hashes(PROMPT, "", "ada"))
    routes = {}
    for name in ("ada", "bob"):
        response = await locked.ask(await locked.key(name))
        routes[name] = response.headers["x-baton-route"]
    assert "predicted_hit_tokens=4;" in routes["ada"]
    assert "predicted_hit_tokens=0;" in routes["bob"]


async def test_requests_beyond_the_quota_get_429_with_the_time_to_wait(locked: Locked) -> None:
    headers = await locked.key(requests_per_minute=2, tokens_per_minute=1000)
    first = await locked.ask(headers)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-tokens"] == "991"  # 5 in the prompt, 4 of max_tokens
    await locked.ask(headers)
    refused = await locked.ask(headers)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(locked.router.workers["decode-0"].submits) == 2


async def test_tokens_are_reserved_by_estimate_and_charged_as_used(locked: Locked) -> None:
    """Two answers of 4 tokens that asked for 40 fit into 60: what was not used came back."""
    headers = await locked.key(tokens_per_minute=60)
    worker = locked.router.workers["decode-0"]
    token = worker.script(PROMPT, [worker.script(PROMPT, [])])
    stops = {"max_tokens": 40, "stop_token_ids": [token]}
    first, second = await locked.ask(headers, **stops), await locked.ask(headers, **stops)
    assert first.status_code == second.status_code == 200, (first.json()["usage"], second.text)
    used = first.json()["usage"]["total_tokens"]
    assert used < 20
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == 60 - used - 45


async def test_a_stream_that_the_client_leaves_is_charged_for_what_came(locked: Locked) -> None:
    headers = await locked.key(tokens_per_minute=100)
    worker = locked.router.workers["decode-0"]
    worker.hold_after = 3
    body = {"model": "test", "prompt": PROMPT, "max_tokens": 50, "ignore_eos": True, "stream": True}
    async with locked.router.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.aiter_lines()
        await anext(lines)
    await worker.until(lambda: bool(worker.cancelled))

    async def is_given_back() -> bool:
        answer = await locked.ask(headers, max_tokens=1)
        return int(answer.headers.get("x-ratelimit-remaining-tokens", 0)) > 60

    await eventually(is_given_back)


async def test_a_prompt_that_no_wait_makes_fit_is_413(locked: Locked) -> None:
    response = await locked.ask(await locked.key(tokens_per_minute=4))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_exceeds_quota"


async def test_one_key_s_limit_is_not_another_s(locked: Locked) -> None:
    busy, other = await locked.key("busy", requests_per_minute=1), await locked.key("other")
    await locked.ask(busy)
    assert (await locked.ask(busy)).status_code == 429
    assert (await locked.ask(other)).status_code == 200
    assert "x-ratelimit-limit-requests" not in (await locked.ask(other)).headers


async def test_a_request_that_no_worker_took_costs_nothing(
    make_router: RouterFactory, redis: tuple[EmbeddedServer, str]
) -> None:
    router = await make_router(require_api_key=True, redis_url=redis[1], worker_timeout_s=0.1)
    store = Store(redis[1])
    locked = Locked(router, RedisApiKeys(store), redis[0])
    headers = await locked.key(requests_per_minute=1, tokens_per_minute=10)
    assert (await locked.ask(headers)).status_code == 503
    await router.add_worker("decode-0")
    assert (await locked.ask(headers)).status_code == 200
    await store.close()


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ([(b"authorization", b"Bearer  abc ")], "abc"),
        ([(b"authorization", b"bearer abc")], "abc"),
        ([(b"x-api-key", b"abc")], "abc"),
        ([(b"x-api-key", b"other"), (b"authorization", b"Bearer abc")], "abc"),
        ([(b"authorization", b"Bearer "), (b"x-api-key", b"abc")], "abc"),
        ([(b"authorization", b"Basic abc")], ""),
        ([(b"authorization", b"Bearer \xff\xfe")], "\xff\xfe"),
        ([], ""),
    ],
)
def test_where_a_key_is_looked_for(headers: list[tuple[bytes, bytes]], secret: str) -> None:
    assert secret_of(headers) == secret
