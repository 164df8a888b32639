"""What clients see of a served request, over real sockets."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from tests.fakes.fake_decode_worker import FakeDecodeWorker, cycling_script, mixing_script
from tests.fakes.tiny_tokenizer import EOS_ID, build_tokenizer
from tests.router.conftest import Router

TOKENIZER = build_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expected_ids(prompt: str, num_tokens: int) -> list[int]:
    script, output = mixing_script(300), []
    for _ in range(num_tokens):
        output.append(script(ids(prompt), output))
    return output


async def test_a_completion_has_openai_s_shape_and_the_decoded_tokens(router: Router) -> None:
    response = await router.complete(ignore_eos=True)
    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "text_completion"
    [choice] = body["choices"]
    assert choice["text"] == TOKENIZER.decode(expected_ids("hello world", 8))
    assert choice["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": len(ids("hello world")),
        "completion_tokens": 8,
        "total_tokens": len(ids("hello world")) + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_chat_answer_comes_from_the_templated_prompt(
    router: Router, worker: FakeDecodeWorker
) -> None:
    body = (await router.chat("hello", ignore_eos=True)).json()
    assert list(worker.submits[0].sequence.prompt_ids) == ids("<s>[user]hello\n[assistant]")
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": TOKENIZER.decode(expected_ids("<s>[user]hello\n[assistant]", 8)),
    }


@pytest.mark.parametrize("tokens_per_update", [1, 3])
async def test_a_chat_stream_gives_role_then_text_then_finish_then_usage(
    router: Router, worker: FakeDecodeWorker, tokens_per_update: int
) -> None:
    worker.tokens_per_update = tokens_per_update
    whole = (await router.chat("hello", ignore_eos=True)).json()
    response = await router.chat(
        "hello", ignore_eos=True, stream=True, stream_options={"include_usage": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[1:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_without_include_usage_a_stream_has_no_usage(router: Router) -> None:
    chunks = events((await router.complete(stream=True)).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_continuous_usage_counts_up(router: Router) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await router.complete(stream=True, stream_options=options, ignore_eos=True)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


async def test_continuous_usage_of_a_chat_begins_at_nothing(router: Router) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"stream_options": options, "max_tokens": 3, "ignore_eos": True}
    chunks = events((await router.chat(stream=True, **fields)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3)
    prompt_tokens = {chunk["usage"]["prompt_tokens"] for chunk in chunks}
    assert len(prompt_tokens) == 1 and 0 not in prompt_tokens


async def test_n_choices_have_their_own_seeds_and_the_first_is_the_client_s(
    router: Router, worker: FakeDecodeWorker
) -> None:
    body = (await router.complete(n=3, seed=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    seeds = [submit.sequence.sampling.seed for submit in worker.submits]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert body["usage"]["prompt_tokens"] == len(ids("hello world"))
    assert body["usage"]["completion_tokens"] == 24


async def test_n_choices_stream_side_by_side(router: Router) -> None:
    chunks = events((await router.chat(n=2, stream=True, ignore_eos=True)).text)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}
    finished = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]], ["hello", "world"], ["hello", [5, 6]]])
async def test_every_form_of_prompt_is_taken(router: Router, worker: FakeDecodeWorker, prompt: Any) -> None:
    body = (await router.complete(prompt=prompt, max_tokens=2)).json()
    parts = [prompt] if isinstance(prompt[0], int) else prompt
    sent = [list(submit.sequence.prompt_ids) for submit in worker.submits]
    assert sent == [ids(part) if isinstance(part, str) else part for part in parts]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(parts)))


async def test_the_stop_token_is_counted_but_not_shown(router: Router, worker: FakeDecodeWorker) -> None:
    worker.script = cycling_script([*ids("hello"), EOS_ID])
    body = (await router.complete(return_token_ids=True)).json()
    [choice] = body["choices"]
    assert choice["text"] == "hello"
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [*ids("hello"), EOS_ID]
    assert choice["prompt_token_ids"] == ids("hello world")
    assert body["usage"]["completion_tokens"] == len(ids("hello")) + 1


async def test_a_stop_token_id_that_is_text_is_hidden_and_named(
    router: Router, worker: FakeDecodeWorker
) -> None:
    [space_world] = ids(" world") if len(ids(" world")) == 1 else [ids(" world")[0]]
    worker.script = cycling_script([*ids("hello"), space_world])
    [choice] = (await router.complete(stop_token_ids=[space_world])).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", space_world)
    [choice] = (await router.complete(stop_token_ids=[space_world], include_stop_str_in_output=True)).json()[
        "choices"
    ]
    assert choice["text"] == "hello" + TOKENIZER.decode([space_world])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_update", [1, 50])
async def test_a_stop_string_ends_the_answer_and_the_work(
    router: Router, worker: FakeDecodeWorker, stream: bool, tokens_per_update: int
) -> None:
    text = "go on and stop here, never there"
    worker.script = cycling_script(ids(text))
    worker.tokens_per_update = tokens_per_update
    worker.hold_after = 50
    response = await router.complete(stop="op here", max_tokens=100, stream=stream)
    if stream:
        chunks = events(response.text)
        shown = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        last = chunks[-1]["choices"][0]
    else:
        [last] = response.json()["choices"]
        shown = last["text"]
    assert shown == "go on and st"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "op here")
    await worker.until(lambda: bool(worker.cancelled))


async def test_min_tokens_lets_an_early_stop_string_pass(router: Router, worker: FakeDecodeWorker) -> None:
    worker.script = cycling_script(ids("stop here and go on there. "))
    first = ids("stop here and go on there. ")
    fields = {"stop": ["stop"], "max_tokens": 100, "ignore_eos": True}
    [choice] = (await router.complete(min_tokens=len(first) - 1, **fields)).json()["choices"]
    assert choice["text"] == "stop here and go on there. "


async def test_characters_are_never_split_in_a_stream(router: Router, worker: FakeDecodeWorker) -> None:
    text = "\u4e2d\u6587 \U0001f600 caf\u00e9"
    worker.script = cycling_script([*ids(text), EOS_ID])
    chunks = events((await router.complete(stream=True, max_tokens=100)).text)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(router: Router) -> None:
    body = (await router.chat(logprobs=True, top_logprobs=2, ignore_eos=True)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert bytes(content[0]["bytes"]).decode("utf-8", "replace") == content[0]["token"]
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -1.5]


async def test_chat_stream_logprobs_cover_every_token(router: Router) -> None:
    chunks = events((await router.chat(logprobs=True, stream=True, ignore_eos=True)).text)
    shown = [c["choices"][0]["logprobs"] for c in chunks]
    assert sum(len(logprobs["content"]) for logprobs in shown if logprobs) == 8


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs_covers_the_prompt_as_lm_eval_reads_it(
    router: Router, max_tokens: int
) -> None:
    prompt = ids("hello world")
    response = await router.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    body = response.json()
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(prompt) + max_tokens
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(prompt) - 1 + max_tokens)
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"][: len(prompt)]) == "hello world"
    assert body["choices"][0]["text"].startswith("hello world")
    assert body["usage"]["completion_tokens"] == max_tokens
    offsets = [0]
    for token in logprobs["tokens"][:-1]:
        offsets.append(offsets[-1] + len(token))
    assert logprobs["text_offset"] == offsets


async def test_a_stream_echoes_the_prompt_once(router: Router) -> None:
    chunks = events((await router.complete(echo=True, stream=True, ignore_eos=True)).text)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "hello world" + TOKENIZER.decode(expected_ids("hello world", 8))


async def test_sampling_fields_reach_the_worker(router: Router, worker: FakeDecodeWorker) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": -1, "min_tokens": 3, "max_tokens": 9,
        "stop_token_ids": [4], "ignore_eos": True, "logit_bias": {"5": -2.5}, "cache_salt": "tenant",
    }  # fmt: skip
    assert (await router.complete(**fields)).status_code == 200
    spec = worker.submits[0].sequence
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"):
        assert getattr(spec.sampling, name) == fields[name]
    assert spec.sampling.seed == 2**64 - 1
    assert (spec.sampling.min_tokens, spec.sampling.max_tokens) == (3, 9)
    assert list(spec.sampling.stop_token_ids) == [4]
    assert dict(spec.sampling.logit_bias) == {5: -2.5}
    assert spec.sampling.ignore_eos
    assert spec.cache_salt == "tenant"
    assert 0 < spec.time_left_s <= 600
    assert not spec.sampling.HasField("num_logprobs")


async def test_defaults_fill_the_context_for_chat_and_16_tokens_for_text(
    router: Router, worker: FakeDecodeWorker
) -> None:
    worker.script = cycling_script([EOS_ID])
    await router.chat(max_tokens=None)
    await router.complete(max_tokens=None)
    chat, text = (submit.sequence for submit in worker.submits)
    assert chat.sampling.max_tokens == 512 - len(chat.prompt_ids)
    assert text.sampling.max_tokens == 16
    assert chat.sampling.temperature == 1.0


async def test_the_request_id_and_the_route_come_back(router: Router, worker: FakeDecodeWorker) -> None:
    response = await router.client.post(
        "/v1/completions",
        json={"model": "test", "prompt": "hi"},
        headers={"x-request-id": "abc-1", "traceparent": "00-1-2-01"},
    )
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"
    route = response.headers["x-baton-route"]
    assert route.startswith("decode=decode-0; prefill=local; predicted_hit_tokens=0; ")
    assert worker.submits[0].sequence.request_id == "abc-1"
    assert worker.submits[0].sequence.traceparent == "00-1-2-01"


@pytest.mark.parametrize("body", [{"prompt": "hi"}, {"prompt": "hi", "model": None}])
async def test_a_request_that_names_no_model_gets_the_one_that_is_served(
    router: Router, body: dict[str, Any]
) -> None:
    response = await router.client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.json()["model"] == "test"


async def test_unknown_fields_have_no_effect(router: Router) -> None:
    assert (await router.complete(frobnicate={"a": 1}, user="me")).status_code == 200


async def test_cached_tokens_are_the_worker_s(router: Router, worker: FakeDecodeWorker) -> None:
    worker.num_hit_tokens = 4
    usage = (await router.complete()).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_continue_final_message_leaves_the_last_message_open(
    router: Router, worker: FakeDecodeWorker
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello wor"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    body = {"model": "test", "messages": messages, "max_tokens": 2, **fields}
    assert (await router.client.post("/v1/chat/completions", json=body)).status_code == 200
    assert list(worker.submits[0].sequence.prompt_ids) == ids("<s>[user]hi\n[assistant]hello wor")


async def test_models_health_version_and_metrics(router: Router) -> None:
    listing = (await router.client.get("/v1/models")).json()
    assert [model["id"] for model in listing["data"]] == ["test"]
    assert listing["data"][0]["max_model_len"] == 512
    assert (await router.client.get("/v1/models/test")).json() == listing["data"][0]
    assert (await router.client.get("/v1/models/other")).status_code == 404
    assert (await router.client.get("/health")).status_code == 200
    assert (await router.client.get("/version")).json()["version"]
    await router.complete(ignore_eos=True)
    assert await router.metric("baton_router_generated_tokens_total") == 8
    assert await router.metric('baton_router_requests_total{endpoint="completions",outcome="ok"}') == 1
    assert await router.metric("baton_router_requests_in_flight") == 0


async def test_the_api_page_describes_the_bodies_without_dangling_references(router: Router) -> None:
    response = await router.client.get("/openapi.json")
    schema = response.json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', response.text))
    assert names <= set(schema["components"]["schemas"])


async def test_forty_streams_at_once_are_all_served_to_their_end(router: Router) -> None:
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(base_url=router.client.base_url, timeout=30, limits=limits) as client:
        bodies = [
            {"model": "test", "prompt": f"hello {i}", "max_tokens": 20, "stream": True} for i in range(40)
        ]
        responses = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
    assert all(response.text.endswith("data: [DONE]\n\n") for response in responses)
