"""Each mistake gets OpenAI's error body, and no worker ever sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proto import common_pb2
from tests.fakes.fake_decode_worker import FakeDecodeWorker
from tests.router.conftest import Router, RouterFactory, running_router

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_router(model_dir: Path) -> AsyncIterator[Router]:
    """One for all: a refused request leaves nothing behind."""
    async with running_router(model_dir) as router:
        await router.add_worker("decode-0")
        yield router


@pytest_asyncio.fixture(loop_scope="module")
async def router(shared_router: Router) -> Router:
    shared_router.workers["decode-0"].submits.clear()
    return shared_router


@pytest_asyncio.fixture(loop_scope="module")
async def make_router(model_dir: Path) -> AsyncIterator[RouterFactory]:
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> Router:
            return await stack.enter_async_context(running_router(model_dir, **settings))

        yield make


ADD: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
BAD_FIELDS: list[dict[str, Any]] = [
    {"model": 7},
    {"temperature": "warm"},
    {"temperature": -1},
    {"temperature": 1e9},
    {"temperature": True},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_k": -7},
    {"top_k": 1.5},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"presence_penalty": 9},
    {"frequency_penalty": -2.5},
    {"n": 0},
    {"n": 100000},
    {"n": "2"},
    {"max_tokens": -1},
    {"max_tokens": 0.5},
    {"max_tokens": 10**9},
    {"max_tokens": 10**30},
    {"min_tokens": 10, "max_tokens": 5},
    {"stop": [1]},
    {"stop": ""},
    {"stop": ["a"] * 1000},
    {"logit_bias": {"999999": 1}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"1": 1000}},
    {"logit_bias": [1]},
    {"stop_token_ids": [999999]},
    {"stop_token_ids": [-1]},
    {"seed": "lucky"},
    {"seed": 2**70},
    {"stream": "maybe"},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": "yes"}},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
    {"response_format": {"type": "json_object"}, "regex": "a+"},
    {"structured_outputs": {}},
    {"structured_outputs": {"regex": "a", "json": {}}},
    {"structured_outputs": {"choice": []}},
    {"guided_json": "{not json"},
    {"guided_json": "[]"},
    {"guided_choice": [5]},
    {"regex": ""},
    {"ebnf": 5},
    {"suffix": "end"},
    {"best_of": 0},
    {"best_of": 2, "n": 3},
    {"best_of": 5, "stream": True},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [999999]},
    {"bad_words": [""]},
    {"truncate_prompt_tokens": 0},
    {"truncate_prompt_tokens": -2},
    {"prompt_logprobs": 1, "stream": True},
    {"prompt_logprobs": 50},
    {"request_id": "with space"},
    {"priority": "high"},
]


def assert_refused(response: Any, worker: FakeDecodeWorker, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert worker.submits == []
    return error


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=repr)
async def test_a_bad_field_is_refused_and_named(
    router: Router, worker: FakeDecodeWorker, fields: dict[str, Any]
) -> None:
    error = assert_refused(await router.complete(**fields), worker)
    assert error["param"] in fields
    assert_refused(await router.chat(**fields), worker)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [1, -1],
        [1, 999999],
        [1.5],
        ["a", 1],
        [1 << 31],
        [1 << 70],
        None,
        {"text": "a"},
        [[1], ["a"]],
        [""],
        7,
        [True],
    ],
    ids=repr,
)
async def test_a_bad_prompt_is_refused(router: Router, worker: FakeDecodeWorker, prompt: Any) -> None:
    assert assert_refused(await router.complete(prompt=prompt), worker)["param"] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        None,
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "wizard", "content": "hi"}],
        [{"content": "hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": 5}],
        [{"role": "tool", "content": "the template raises for this"}],
        ["hi"],
    ],
    ids=repr,
)
async def test_bad_messages_are_refused(router: Router, worker: FakeDecodeWorker, messages: Any) -> None:
    body = {"model": "test", "messages": messages}
    response = await router.client.post("/v1/chat/completions", json=body)
    assert assert_refused(response, worker)["param"] == "messages"


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 2},
        {"logprobs": True, "top_logprobs": 500},
        {"top_logprobs": 2},
        {"best_of": 5},
        {"functions": [{"name": "add"}]},
        {"tools": [{"a": 1}]},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [ADD, ADD]},
        {"tools": [ADD], "tool_choice": "maybe"},
        {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "subtract"}}},
        {"tool_choice": "required"},
        {"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
    ids=repr,
)
async def test_bad_chat_fields_are_refused(
    router: Router, worker: FakeDecodeWorker, fields: dict[str, Any]
) -> None:
    assert_refused(await router.chat(**fields), worker)


@pytest.mark.parametrize("logprobs", [True, 21, -1])
async def test_bad_completion_logprobs_are_refused(
    router: Router, worker: FakeDecodeWorker, logprobs: Any
) -> None:
    assert_refused(await router.complete(logprobs=logprobs), worker)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b'{"model": "test", "messages": NaN}',
        b"\xff\xfe",
        b'{"model": "test", "prompt": "\\ud800"}',
        b"[" * 100_000,
    ],
)
async def test_broken_json_is_refused(router: Router, worker: FakeDecodeWorker, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert_refused(await router.client.post(path, content=body), worker)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "repetition_penalty"])
async def test_a_number_that_is_none_is_refused(
    router: Router, worker: FakeDecodeWorker, field: str, number: str
) -> None:
    body = f'{{"model": "test", "prompt": "hi", "{field}": {number}}}'
    assert_refused(await router.client.post("/v1/completions", content=body), worker)


async def test_an_unknown_model_is_not_found(router: Router, worker: FakeDecodeWorker) -> None:
    error = assert_refused(await router.complete(model="gpt-17"), worker, 404)
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize("prompt", [[5] * 600, [5] * 512, "hello " * 600, "x" * 500_000])
async def test_an_over_long_prompt_has_its_own_code(
    router: Router, worker: FakeDecodeWorker, prompt: Any
) -> None:
    error = assert_refused(await router.complete(prompt=prompt), worker)
    assert error["code"] == "context_length_exceeded"


async def test_max_tokens_beyond_the_context_has_the_same_code(
    router: Router, worker: FakeDecodeWorker
) -> None:
    error = assert_refused(await router.complete(prompt=[5] * 500, max_tokens=13), worker)
    assert error["code"] == "context_length_exceeded"
    assert (await router.complete(prompt=[5] * 500, max_tokens=12)).status_code == 200


async def test_the_answer_never_repeats_the_prompt(router: Router, worker: FakeDecodeWorker) -> None:
    response = await router.complete(prompt=["my secret", 5])
    assert "secret" not in response.text


async def test_a_body_that_is_too_large_is_refused(make_router: RouterFactory) -> None:
    router = await make_router(max_body_bytes=1000)
    worker = await router.add_worker("decode-0")
    assert_refused(await router.complete(prompt="x" * 2000), worker, 413)

    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    assert_refused(await router.client.post("/v1/completions", content=pieces()), worker, 413)


async def test_too_many_sequences_are_refused(make_router: RouterFactory) -> None:
    router = await make_router(max_sequences=4)
    worker = await router.add_worker("decode-0")
    assert_refused(await router.complete(prompt=["a", "b", "c"], n=2), worker)
    assert (await router.complete(prompt=["a", "b"], n=2)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
async def test_an_unknown_path_answers_in_the_same_shape(
    router: Router, worker: FakeDecodeWorker, method: str, path: str, status: int
) -> None:
    assert_refused(await router.client.request(method, path), worker, status)


async def test_a_worker_that_has_no_room_gives_503_with_retry_after(
    router: Router, worker: FakeDecodeWorker
) -> None:
    error = common_pb2.Error(
        kind=common_pb2.ERROR_KIND_OVERLOADED, message="no room before the deadline", retry_after_s=2.5
    )
    worker.errors = [error]
    response = await router.complete()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "overloaded"


async def test_without_any_worker_a_request_waits_and_then_gets_503(make_router: RouterFactory) -> None:
    router = await make_router(worker_timeout_s=0.05)
    assert (await router.client.get("/ready")).status_code == 503
    response = await router.complete()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_a_request_that_came_before_its_worker_is_served(make_router: RouterFactory) -> None:
    router = await make_router()
    response = asyncio.create_task(router.complete())
    await router.add_worker("decode-0")
    assert (await response).status_code == 200
    assert (await router.client.get("/ready")).status_code == 200
