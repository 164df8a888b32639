from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.e2e.conftest import random_prompt
from tests.e2e.stack import Stack

Oracle = Callable[[list[int], int], list[int]]


def _sse(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 200, 700])
def test_tokens_equal_transformers_for_prompts_around_block_and_chunk_edges(
    stack: Stack, oracle: Oracle, num_tokens: int
) -> None:
    prompt = random_prompt(num_tokens, num_tokens)
    assert stack.output_ids(prompt, 64) == oracle(prompt, 64)


def test_the_prompt_is_computed_by_the_prefill_worker_and_the_answer_by_the_decode_worker(
    stack: Stack,
) -> None:
    [prefill], [decode] = stack.processes("prefill"), stack.processes("decode")
    before = stack.metrics(prefill), stack.metrics(decode)
    stack.output_ids(random_prompt(1001, 400), 32)
    after = stack.metrics(prefill), stack.metrics(decode)
    computed = [
        a["baton_engine_prefill_tokens_total"] - b["baton_engine_prefill_tokens_total"]
        for a, b in zip(after, before, strict=True)
    ]
    generated = [
        a["baton_engine_decode_tokens_total"] - b["baton_engine_decode_tokens_total"]
        for a, b in zip(after, before, strict=True)
    ]
    assert computed == [400, 0]
    assert generated == [0, 31]


def test_a_repeated_prompt_hits_the_prefix_cache_and_gives_the_same_tokens(stack: Stack) -> None:
    prompt = random_prompt(1002, 320)
    first = stack.complete(prompt, max_tokens=24, ignore_eos=True, return_token_ids=True)
    second = stack.complete(prompt, max_tokens=24, ignore_eos=True, return_token_ids=True)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 300
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]


def test_another_cache_salt_hits_nothing(stack: Stack) -> None:
    prompt = random_prompt(1003, 320)
    stack.complete(prompt, max_tokens=2, cache_salt="a")
    other = stack.complete(prompt, max_tokens=2, cache_salt="b")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_streamed_and_whole_chat_answers_are_the_same_text(stack: Stack) -> None:
    fields = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    whole = stack.chat("What is a baton?", **fields).json()
    streamed = stack.chat("What is a baton?", stream=True, stream_options={"include_usage": True}, **fields)
    chunks = _sse(streamed.text)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 40 == whole["usage"]["completion_tokens"]


def test_a_seed_gives_the_same_draw_again_and_another_seed_another(stack: Stack) -> None:
    prompt = random_prompt(1004, 50)
    draws = [stack.output_ids(prompt, 24, temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]


def test_a_single_token_needs_no_decode(stack: Stack, oracle: Oracle) -> None:
    [decode] = stack.processes("decode")
    before = stack.metrics(decode)["baton_engine_decode_tokens_total"]
    prompt = random_prompt(1005, 100)
    assert stack.output_ids(prompt, 1) == oracle(prompt, 1)
    assert stack.metrics(decode)["baton_engine_decode_tokens_total"] == before


def test_an_answer_ends_at_a_stop_string_that_is_not_shown(stack: Stack) -> None:
    whole = stack.complete(random_prompt(1006, 30), max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    choice = stack.complete(random_prompt(1006, 30), max_tokens=40, ignore_eos=True, stop=stop)["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_nothing_is_held_when_all_is_done(stack: Stack) -> None:
    stack.output_ids(random_prompt(1007, 333), 20)
    stack.assert_no_block_is_lost()
