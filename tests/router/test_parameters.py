"""Parameters beyond the common ones: what reaches the worker, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kvstore.registry import RedisRegistry
from kvstore.store import Store
from router.app import build
from router.settings import RouterSettings
from tests.fakes.fake_decode_worker import FakeDecodeWorker, cycling_script, decode_record
from tests.fakes.redis_server import redis_server
from tests.fakes.tiny_tokenizer import EOS_ID, write_model_dir
from tests.router.conftest import Router, RouterFactory
from tests.router.test_generation_endpoints import ids


async def test_branches_of_one_prompt_go_to_one_worker_as_a_group(router: Router) -> None:
    await router.add_worker("decode-1")
    assert (await router.complete(prompt=["hello", "world"], n=3)).status_code == 200
    by_worker = [list(worker.submits) for worker in router.workers.values()]
    groups = [{submit.branch_group for submit in submits} for submits in by_worker]
    assert sum(len(submits) for submits in by_worker) == 6
    assert groups[0].isdisjoint(groups[1])
    assert len(groups[0] | groups[1]) == 2
    assert 0 not in groups[0] | groups[1]
    for submits in by_worker:
        for group in {submit.branch_group for submit in submits}:
            assert len([submit for submit in submits if submit.branch_group == group]) == 3


async def test_a_single_answer_belongs_to_no_group(router: Router, worker: FakeDecodeWorker) -> None:
    await router.complete()
    assert worker.submits[0].branch_group == 0


async def test_best_of_shows_the_likeliest_and_counts_all(router: Router, worker: FakeDecodeWorker) -> None:
    body = (await router.complete(n=2, best_of=4, ignore_eos=True)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 32
    assert len(worker.submits) == 4
    assert worker.submits[0].sequence.sampling.HasField("num_logprobs")


@pytest.mark.parametrize(("num_kept", "expected"), [(3, 3), (600, None), (-1, None)])
async def test_a_prompt_is_truncated_at_its_beginning(
    router: Router, worker: FakeDecodeWorker, num_kept: int, expected: int | None
) -> None:
    prompt = ids("hello world, hello runner")
    await router.complete(prompt=prompt, truncate_prompt_tokens=num_kept)
    sent = list(worker.submits[0].sequence.prompt_ids)
    assert sent == (prompt[-expected:] if expected else prompt)


async def test_truncation_to_what_fits_leaves_room_for_the_answer(
    router: Router, worker: FakeDecodeWorker
) -> None:
    response = await router.complete(prompt=[5] * 600, truncate_prompt_tokens=-1, max_tokens=12)
    assert response.status_code == 200
    assert len(worker.submits[0].sequence.prompt_ids) == 500


async def test_prompt_logprobs_are_by_token_id(router: Router, worker: FakeDecodeWorker) -> None:
    prompt = ids("hello world")
    [choice] = (await router.complete(prompt=prompt, prompt_logprobs=2)).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == len(prompt)
    entry = choice["prompt_logprobs"][1][str(prompt[1])]
    assert (entry["logprob"], entry["rank"]) == (-0.5, 1)
    chat = (await router.chat(prompt_logprobs=0)).json()
    assert len(chat["prompt_logprobs"]) == len(worker.submits[1].sequence.prompt_ids)


async def test_token_constraints_reach_the_worker(router: Router, worker: FakeDecodeWorker) -> None:
    await router.complete(allowed_token_ids=[5, 6], bad_words=["hand"])
    sampling = worker.submits[0].sequence.sampling
    assert list(sampling.allowed_token_ids) == [5, 6]
    words = {tuple(word.token_ids) for word in sampling.bad_words}
    assert words == {tuple(ids("hand")), tuple(ids(" hand"))}


async def test_special_tokens_can_be_added_to_a_chat_and_left_out_of_a_text(
    router: Router, worker: FakeDecodeWorker
) -> None:
    for value in (True, False):
        assert (await router.chat(add_special_tokens=value)).status_code == 200
        assert (await router.complete(add_special_tokens=value)).status_code == 200


async def test_the_body_may_name_the_request_and_a_header_wins(
    router: Router, worker: FakeDecodeWorker
) -> None:
    response = await router.complete(request_id="from-body")
    assert response.headers["x-request-id"] == "from-body"
    assert worker.submits[0].sequence.request_id == "from-body"
    body = {"model": "test", "prompt": "hi", "request_id": "from-body"}
    response = await router.client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert response.json()["id"] == "cmpl-mine"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
    ],
)
async def test_every_endpoint_takes_the_shared_fields(
    make_router: RouterFactory, path: str, body: dict[str, Any]
) -> None:
    router = await make_router(rejects_unknown_fields=True)
    worker = await router.add_worker("decode-0")
    sampled = {"top_k": 7, "seed": 5, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [9]}
    sampled |= {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    others = {"priority": 4, "cache_salt": "pepper", "request_id": "mine"}
    response = await router.client.post(path, json={**body, **sampled, **others, "min_p": 0.125})
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == "mine"
    [submit] = worker.submits
    sampling = submit.sequence.sampling
    assert {name: getattr(sampling, name) for name in sampled} == sampled
    assert sampling.min_p == 0.125
    assert (submit.sequence.priority, submit.sequence.cache_salt) == (4, "pepper")
    bad = await router.client.post(path, json={**body, "top_k": "many"})
    assert bad.status_code == 400


async def test_strict_routers_refuse_unknown_fields_by_name(make_router: RouterFactory) -> None:
    router = await make_router(rejects_unknown_fields=True)
    await router.add_worker("decode-0")
    response = await router.complete(frobnicate=1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "frobnicate"
    assert (await router.complete(user="me", priority=3)).status_code == 200


async def test_tokenize_and_detokenize_are_each_other_s_inverse(router: Router) -> None:
    body = {"model": "test", "prompt": "hello \u4e2d\u6587", "return_token_strs": True}
    told = (await router.client.post("/tokenize", json=body)).json()
    assert told["tokens"] == ids("hello \u4e2d\u6587")
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 512
    back = await router.client.post("/detokenize", json={"tokens": told["tokens"]})
    assert back.json() == {"prompt": "hello \u4e2d\u6587"}


async def test_the_tokenizer_s_facts_are_told(router: Router) -> None:
    info = (await router.client.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "{{ bos_token }}" in info["chat_template"]
    assert (await router.client.get("/tokenizer_info?model=other")).status_code == 404


async def test_messages_are_tokenized_as_a_chat_would(router: Router, worker: FakeDecodeWorker) -> None:
    messages = [{"role": "user", "content": "hello"}]
    told = (await router.client.post("/tokenize", json={"messages": messages})).json()
    await router.chat("hello")
    assert told["tokens"] == list(worker.submits[0].sequence.prompt_ids)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [999999]}),
        ("/detokenize", {}),
    ],
)
async def test_bad_token_requests_are_refused(router: Router, path: str, body: dict[str, Any]) -> None:
    response = await router.client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_load_counts_open_requests(router: Router, worker: FakeDecodeWorker) -> None:
    assert (await router.client.get("/load")).json() == {
        "server_load": 0,
        "num_running": 0,
        "num_waiting": 0,
    }


@pytest.fixture
async def two_models(model_dir: Path, tmp_path: Path) -> AsyncIterator[tuple[FastAPI, str]]:
    """A router of "test" and "other", which follows both in a real Redis."""
    other = write_model_dir(tmp_path / "other")
    with redis_server() as (_, url):
        settings = RouterSettings(
            model=model_dir,
            served_model_name="test",
            extra_models=f"other={other}",
            redis_url=url,
        )
        app = build(settings)
        async with app.router.lifespan_context(app):
            yield app, url


async def test_two_models_have_their_own_workers_and_names(
    two_models: tuple[FastAPI, str],
) -> None:
    app, url = two_models
    store = Store(url)
    workers = {}
    for name, text in (("test", "hello"), ("other", "there")):
        workers[name] = FakeDecodeWorker(script=cycling_script([*ids(text), EOS_ID]))
        record = decode_record(f"{name}-0", await workers[name].start(), model=name)
        await RedisRegistry(store, name).announce(record, 60.0)
        fleet = app.state.serving.models.named(name).fleet
        while not fleet.decode_workers():
            assert await fleet.wait_for_change(10.0)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert names == ["test", "other"]
        assert (await client.get("/v1/models/other")).json()["id"] == "other"
        for name, text in (("other", "there"), ("test", "hello")):
            body = (await client.post("/v1/completions", json={"model": name, "prompt": "hi"})).json()
            assert (body["model"], body["choices"][0]["text"]) == (name, text)
        unknown = await client.post("/v1/completions", json={"model": "third", "prompt": "hi"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    for worker in workers.values():
        assert len(worker.submits) == 1
        await worker.kill()
    await store.close()


@pytest.mark.parametrize("extra", ["other", "=x", "test=/tmp", "a=/tmp,a=/tmp"])
def test_models_that_cannot_be_told_apart_are_refused_at_start(model_dir: Path, extra: str) -> None:
    with pytest.raises(ValueError, match="extra_models"):
        RouterSettings(model=model_dir, served_model_name="test", extra_models=extra)
