"""Every parameter of the completion endpoints, seen to work over real workers: prefill, hand-off, decode."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import random_prompt
from tests.e2e.stack import Stack

PROMPT = random_prompt(500, 40)
CHAT: Any = [{"role": "user", "content": "Which way to the station?"}]
GREEDY_TOKENS = 12


def first(stack: Stack, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    """The first choice, with its token ids."""
    fields = {"max_tokens": GREEDY_TOKENS, "ignore_eos": True, "return_token_ids": True, **fields}
    choice: dict[str, Any] = stack.complete(prompt, **fields)["choices"][0]
    return choice


def ids(stack: Stack, **fields: Any) -> list[int]:
    token_ids: list[int] = first(stack, **fields)["token_ids"]
    return token_ids


def events(stack: Stack, path: str, **body: Any) -> list[dict[str, Any]]:
    """Of a streamed answer; it ends with [DONE]."""
    response = stack.client.post(path, json={"model": stack.model, "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def greedy(stack: Stack) -> list[int]:
    return ids(stack)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=str)
def test_what_leaves_only_the_likeliest_token_is_greedy(
    stack: Stack, greedy: list[int], fields: dict[str, Any]
) -> None:
    assert ids(stack, temperature=1.5, seed=1, **fields) == greedy


def test_a_seed_repeats_an_answer_and_another_one_does_not(stack: Stack, greedy: list[int]) -> None:
    drawn = [ids(stack, temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 50.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}], ids=str
)
def test_penalties_keep_a_token_from_coming_again(stack: Stack, fields: dict[str, Any]) -> None:
    two = {"logit_bias": {"77": 100, "78": 100}, "max_tokens": 2}
    prompts = [random_prompt(600 + seed, 20) for seed in range(40)]
    repeating = [prompt for prompt in prompts if len(set(ids(stack, prompt=prompt, **two))) == 1]
    assert any(len(set(ids(stack, prompt=prompt, **two, **fields))) == 2 for prompt in repeating)


def test_a_ban_by_bias_and_allowed_tokens(stack: Stack, greedy: list[int]) -> None:
    assert greedy[0] not in ids(stack, logit_bias={str(greedy[0]): -100})
    assert set(ids(stack, allowed_token_ids=[40, 41, 42])) <= {40, 41, 42}


def test_stop_tokens_end_an_answer_and_are_named(stack: Stack, greedy: list[int]) -> None:
    stopped = first(stack, stop_token_ids=[greedy[4]])
    place = greedy.index(greedy[4]) + 1
    assert (stopped["token_ids"], stopped["finish_reason"]) == (greedy[:place], "stop")
    assert stopped["stop_reason"] == greedy[4]
    late = first(stack, stop_token_ids=[greedy[4]], min_tokens=place + 2)
    assert len(late["token_ids"]) >= place + 2


def test_stop_strings_end_an_answer_and_are_shown_if_asked_for(stack: Stack) -> None:
    text = first(stack, max_tokens=30)["text"]
    stop = text[10:13]
    hidden = first(stack, max_tokens=30, stop=stop)
    assert (hidden["text"], hidden["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert hidden["stop_reason"] == stop
    shown = first(stack, max_tokens=30, stop=[stop], include_stop_str_in_output=True)
    assert shown["text"] == text[: text.index(stop) + len(stop)]


def test_logprobs_are_of_what_was_drawn_and_of_the_likeliest(stack: Stack, greedy: list[int]) -> None:
    logprobs = first(stack, logprobs=3)["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == GREEDY_TOKENS
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert max(top.values()) == logprob <= 0
        assert token in top
    chat = stack.chat(
        "hi", max_tokens=4, logprobs=True, top_logprobs=2, ignore_eos=True, temperature=0
    ).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 and bytes(entry["bytes"]) is not None for entry in content)


def test_echo_shows_the_prompt_and_scores_it(stack: Stack) -> None:
    whole = stack.complete("Which way", echo=True, logprobs=1, max_tokens=3, ignore_eos=True)["choices"][0]
    assert whole["text"].startswith("Which way")
    num_prompt = len(stack.client.post("/tokenize", json={"prompt": "Which way"}).json()["tokens"])
    logprobs = whole["logprobs"]["token_logprobs"]
    assert len(logprobs) == num_prompt + 3
    assert logprobs[0] is None and all(logprob <= 0 for logprob in logprobs[1:])
    parts = events(
        stack, "/v1/completions", prompt="Which way", echo=True, logprobs=1, max_tokens=3, ignore_eos=True,
        temperature=0,
    )  # fmt: skip
    assert "".join(choice["text"] for part in parts for choice in part["choices"]) == whole["text"]
    choices = [choice for part in parts for choice in part["choices"]]
    streamed = [logprob for choice in choices for logprob in choice["logprobs"]["token_logprobs"]]
    assert streamed[0] is None and streamed[1:] == pytest.approx(logprobs[1:], abs=1e-3)
    only = stack.complete("Which way", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert only["text"] == "Which way" and len(only["logprobs"]["token_logprobs"]) == num_prompt


def test_prompt_logprobs_by_token_id_and_not_in_a_stream(stack: Stack) -> None:
    choice = first(stack, prompt_logprobs=2, max_tokens=1)
    entries = choice["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(PROMPT)
    assert all(str(token) in entry for token, entry in zip(PROMPT[1:], entries[1:], strict=True))
    body = {"prompt": PROMPT, "prompt_logprobs": 2, "stream": True}
    assert stack.client.post("/v1/completions", json=body).status_code == 400


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt(stack: Stack, kind: str) -> None:
    text = "Which way to go"
    token_ids = stack.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    forms: dict[str, Any] = {
        "text": text,
        "texts": [text, text],
        "ids": token_ids,
        "lists of ids": [token_ids],
    }
    choices = stack.complete(forms[kind], max_tokens=5, ignore_eos=True)["choices"]
    assert {choice["text"] for choice in choices} == {
        stack.complete(text, max_tokens=5, ignore_eos=True)["choices"][0]["text"]
    }
    assert [choice["index"] for choice in choices] == list(range(len(choices)))


def test_n_and_best_of(stack: Stack) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    three = stack.complete(PROMPT, n=3, **fields)
    assert len({choice["text"] for choice in three["choices"]}) == 3
    assert three["choices"][0]["text"] == stack.complete(PROMPT, **fields)["choices"][0]["text"]
    assert three["usage"]["completion_tokens"] == 18
    best = stack.complete(PROMPT, n=1, best_of=3, **fields)
    assert best["choices"][0]["text"] in {choice["text"] for choice in three["choices"]}
    assert best["usage"]["completion_tokens"] == 18


def test_many_choices(stack: Stack) -> None:
    answer = stack.complete(PROMPT, n=40, temperature=1.0, max_tokens=4, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(40))


def test_usage_in_streams(stack: Stack) -> None:
    fields: dict[str, Any] = {"messages": CHAT, "max_tokens": 5, "ignore_eos": True}
    parts = events(stack, "/v1/chat/completions", **fields, stream_options={"include_usage": True})
    assert [part["choices"] for part in parts if part.get("usage")] == [[]]
    assert parts[-1]["usage"]["completion_tokens"] == 5
    assert parts[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        part["usage"]["completion_tokens"]
        for part in events(stack, "/v1/chat/completions", **fields, stream_options=options)
    ]
    assert counts == sorted(counts) and counts[-1] == 5 and len(set(counts)) > 2
    assert all(
        "usage" not in part or not part["usage"] for part in events(stack, "/v1/chat/completions", **fields)
    )


def test_truncated_prompts(stack: Stack) -> None:
    answer = stack.complete(PROMPT, truncate_prompt_tokens=7, max_tokens=2)
    assert answer["usage"]["prompt_tokens"] == 7
    long = random_prompt(501, 12_000)
    assert stack.client.post("/v1/completions", json={"prompt": long}).status_code == 400
    fitted = stack.complete(long, truncate_prompt_tokens=-1, max_tokens=2)
    assert 100 < fitted["usage"]["prompt_tokens"] < len(long)


def test_templates_can_be_steered(stack: Stack) -> None:
    def prompt_of(messages: Any = CHAT, **fields: Any) -> list[int]:
        body = {"messages": messages, **fields}
        tokens: list[int] = stack.client.post("/tokenize", json=body).json()["tokens"]
        answer = stack.client.post(
            "/v1/chat/completions", json={**body, "max_tokens": 1, "return_token_ids": True}
        )
        assert answer.json()["prompt_token_ids"] == tokens
        return tokens

    plain, without = prompt_of(), prompt_of(add_generation_prompt=False)
    assert plain[: len(without)] == without and len(plain) > len(without)
    begun = [*CHAT, {"role": "assistant", "content": "Go"}]
    going_on = prompt_of(begun, add_generation_prompt=False, continue_final_message=True)
    closed = prompt_of(begun, add_generation_prompt=False)
    assert going_on != closed
    assert prompt_of(chat_template_kwargs={"enable_thinking": False})


def test_ids_of_request_prompt_and_answer(stack: Stack) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
    response = stack.client.post("/v1/completions", json={**body, "request_id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    [choice] = response.json()["choices"]
    assert choice["prompt_token_ids"] == PROMPT and len(choice["token_ids"]) == 3
    parts = [c for part in events(stack, "/v1/completions", **body) for c in part["choices"]]
    assert parts[0]["prompt_token_ids"] == PROMPT
    assert sum(len(part["token_ids"]) for part in parts) == 3
    assert stack.client.post("/v1/completions", json={**body, "priority": 3, "user": "me"}).status_code == 200


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "walk",
        "parameters": {
            "type": "object",
            "properties": {"turn": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
            "required": ["turn", "far"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "walk"}}], ids=str)
def test_forced_tools_stream_as_they_are_whole(stack: Stack, choice: Any) -> None:
    fields = {"messages": CHAT, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "seed": 4}
    fields["parallel_tool_calls"] = False
    whole = stack.client.post("/v1/chat/completions", json={"model": "tiny", **fields}).json()["choices"][0]
    [call] = whole["message"]["tool_calls"]
    arguments = ""
    names = []
    reasons = []
    for part in events(stack, "/v1/chat/completions", **fields):
        for piece in part["choices"]:
            reasons.append(piece["finish_reason"])
            for tool_call in piece["delta"].get("tool_calls", ()):
                names += [tool_call["function"]["name"]] if "name" in tool_call["function"] else []
                arguments += tool_call["function"].get("arguments", "")
    assert names == ["walk"] and reasons[-1] == whole["finish_reason"] == "tool_calls"
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])
    assert json.loads(arguments)["turn"] in ("left", "right")


def test_tools_may_be_ignored(stack: Stack) -> None:
    for choice in ("auto", "none"):
        answer = stack.chat("hi", tools=[TOOL], tool_choice=choice, max_tokens=4)
        assert answer.status_code == 200, answer.text


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": json.dumps(SCHEMA)},
        {"regex": r'\{"a": (1|2)\}'},
        {"guided_regex": r'\{"a": (1|2)\}'},
        {"ebnf": 'root ::= "{\\"a\\": " ("1" | "2") "}"'},
        {"guided_grammar": 'root ::= "{\\"a\\": " ("1" | "2") "}"'},
        {"structured_outputs": {"choice": ['{"a": 1}', '{"a": 2}']}},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("streams", [False, True])
def test_every_way_to_ask_for_structure(stack: Stack, fields: dict[str, Any], streams: bool) -> None:
    body = {"messages": CHAT, "max_tokens": 400, "seed": 2, **fields}
    if streams:
        parts = events(stack, "/v1/chat/completions", **body)
        text = "".join(c["delta"].get("content") or "" for part in parts for c in part["choices"])
    else:
        text = stack.chat(
            "Which way to the station?", **{k: v for k, v in body.items() if k != "messages"}
        ).json()["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in (1, 2)


def test_responses_and_messages_stream_their_events(stack: Stack) -> None:
    body = {"model": "tiny", "input": "Which way?", "max_output_tokens": 6, "stream": True}
    page = stack.client.post("/v1/responses", json=body).text
    names = [line[7:] for line in page.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete")
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "stream": True}
    page = stack.client.post("/v1/messages", json=body).text
    names = [line[7:] for line in page.splitlines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop")


def test_nothing_is_left_behind(stack: Stack) -> None:
    stack.assert_no_block_is_lost()
