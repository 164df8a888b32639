"""Every mistake gets OpenAI's error body and a 4xx, and costs no worker anything."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import random_prompt
from tests.e2e.stack import Stack

_CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
_TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"messages": []}, 400),
        ({"messages": "hi"}, 400),
        ({"messages": [{"role": "user"}]}, 400),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400),
        ({"model": "gpt-17"}, 404),
        ({"model": 7}, 400),
        ({"temperature": "warm"}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": 1e9}, 400),
        ({"top_p": 0}, 400),
        ({"top_p": 1.5}, 400),
        ({"top_k": -7}, 400),
        ({"min_p": 2}, 400),
        ({"repetition_penalty": 0}, 400),
        ({"presence_penalty": 9}, 400),
        ({"n": 0}, 400),
        ({"n": 100000}, 400),
        ({"max_tokens": 0.5}, 400),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"stop": [1]}, 400),
        ({"stop": ["a"] * 1000}, 400),
        ({"logit_bias": {"999999": 1}}, 400),
        ({"logit_bias": {"x": 1}}, 400),
        ({"stop_token_ids": [999999]}, 400),
        ({"top_logprobs": 500, "logprobs": True}, 400),
        ({"seed": "lucky"}, 400),
        ({"stream": "maybe"}, 400),
    ],
)
def test_a_bad_chat_field_is_refused(stack: Stack, changes: dict[str, Any], status: int) -> None:
    response = stack.client.post("/v1/chat/completions", json=_CHAT | changes)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [1, -1], [1, 999999], [1.5], ["a", 1], None, {"text": "a"}, [[1], ["a"]]],
    ids=repr,
)
def test_a_bad_prompt_is_refused(stack: Stack, prompt: Any) -> None:
    response = stack.client.post("/v1/completions", json=_TEXT | {"prompt": prompt})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b"null", b'{"model": "tiny", "messages": NaN}', b"\xff\xfe"]
)
def test_broken_json_is_refused(stack: Stack, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = stack.client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("temperature", ["NaN", "Infinity", "-Infinity"])
def test_a_temperature_that_is_no_number_is_refused(stack: Stack, temperature: str) -> None:
    body = f'{{"model": "tiny", "prompt": "hi", "max_tokens": 2, "temperature": {temperature}}}'
    headers = {"content-type": "application/json"}
    response = stack.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text


def test_a_prompt_longer_than_the_context_is_refused_with_its_own_code(stack: Stack) -> None:
    response = stack.client.post("/v1/completions", json=_TEXT | {"prompt": random_prompt(1, 5000)})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_an_unknown_path_answers_in_the_same_shape(stack: Stack) -> None:
    response = stack.client.get("/v1/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["message"]


def test_the_stack_still_answers_and_holds_nothing(stack: Stack) -> None:
    assert stack.client.post("/v1/chat/completions", json=_CHAT).status_code == 200
    stack.assert_no_block_is_lost()
