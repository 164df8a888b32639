"""Tools, reasoning and structured output as chat clients see them, over a scripted worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proto import common_pb2
from tests.fakes.fake_decode_worker import FakeDecodeWorker, cycling_script
from tests.fakes.tiny_tokenizer import CHAT_TEMPLATE, EOS_ID, build_tokenizer, write_model_dir
from tests.router.conftest import Router, RouterFactory
from tests.router.test_generation_endpoints import events, ids

TOKENIZER = build_tokenizer()
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {}},
        },
    },
}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
TOOLS_TEMPLATE = "{{ tools }}" + CHAT_TEMPLATE
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n{# </think> #}")


def answers(worker: FakeDecodeWorker, text: str, tokens_per_update: int = 1) -> None:
    worker.script = cycling_script([*ids(text), EOS_ID])
    worker.tokens_per_update = tokens_per_update


def prompt_of(worker: FakeDecodeWorker) -> str:
    return TOKENIZER.decode(list(worker.submits[-1].sequence.prompt_ids), skip_special_tokens=False)


async def router_with(
    make_router: RouterFactory, directory: Path, template: str, **settings: Any
) -> tuple[Router, FakeDecodeWorker]:
    write_model_dir(directory)
    (directory / "chat_template.jinja").write_text(template)
    (directory / "config.json").write_text('{"max_position_embeddings": 4096}')
    router = await make_router(model=directory, **settings)
    return router, await router.add_worker("decode-0", max_model_len=4096)


@pytest.fixture
async def router(make_router: RouterFactory, tmp_path: Path) -> Router:
    router, _ = await router_with(make_router, tmp_path, CHAT_TEMPLATE)
    return router


def streamed_calls(text: str) -> list[dict[str, Any]]:
    """As the official client adds them up."""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in events(text):
        for piece in chunk["choices"][0]["delta"].get("tool_calls", []):
            call = calls.setdefault(piece["index"], {"arguments": ""})
            call["arguments"] += piece["function"]["arguments"]
            if "id" in piece:
                assert "id" not in call
                call |= {"id": piece["id"], "name": piece["function"]["name"]}
    return list(calls.values())


@pytest.mark.parametrize("tokens_per_update", [1, 4, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_of_the_model_is_one_for_the_client(
    router: Router, worker: FakeDecodeWorker, stream: bool, tokens_per_update: int
) -> None:
    answers(worker, f"I look.\n{CALL}", tokens_per_update)
    response = await router.chat(tools=[WEATHER], max_tokens=200, stream=stream)
    if stream:
        [call] = streamed_calls(response.text)
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        finish_reason = choices[-1]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        [given] = choice["message"]["tool_calls"]
        assert given["type"] == "function"
        call = {"id": given["id"], **given["function"]}
        content, finish_reason = choice["message"]["content"], choice["finish_reason"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Rome"})
    assert call["id"].startswith("call_")
    assert content == "I look."
    assert finish_reason == "tool_calls"


async def test_a_call_without_words_has_no_content(router: Router, worker: FakeDecodeWorker) -> None:
    answers(worker, CALL)
    [choice] = (await router.chat(tools=[WEATHER], max_tokens=200)).json()["choices"]
    assert choice["message"]["content"] is None


async def test_an_answer_cut_inside_a_call_says_length(router: Router, worker: FakeDecodeWorker) -> None:
    answers(worker, CALL)
    [choice] = (await router.chat(tools=[WEATHER], max_tokens=len(ids(CALL)) - 20)).json()["choices"]
    assert choice["finish_reason"] == "length"


async def test_a_template_that_knows_tools_gets_them(make_router: RouterFactory, tmp_path: Path) -> None:
    router, worker = await router_with(make_router, tmp_path, TOOLS_TEMPLATE)
    await router.chat(tools=[WEATHER])
    assert "'name': 'weather'" in prompt_of(worker)
    assert "<tools>" not in prompt_of(worker)
    await router.chat(tools=[WEATHER], tool_choice="none")
    assert "weather" not in prompt_of(worker)


async def test_a_template_without_tools_gets_them_in_the_system_message(
    router: Router, worker: FakeDecodeWorker
) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    response = await router.chat(messages=messages, tools=[WEATHER])
    assert response.status_code == 200, response.text
    prompt = prompt_of(worker)
    assert prompt.startswith("<s>[system]Be brief.\n\n")
    assert '"name": "weather"' in prompt
    assert '[assistant]<tool_call>{"name": "weather", "arguments": {"city":1}}</tool_call>' in prompt
    assert "[user]<tool_response>\nsunny\n</tool_response>" in prompt


async def test_deepseek_s_template_gets_its_own_form_and_writes_calls_itself(
    make_router: RouterFactory, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'"
        " + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n'"
        " + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}"
        "{% endfor %}{% endfor %}"
    )
    router, worker = await router_with(make_router, tmp_path, template)
    call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )
    answers(worker, call)
    body = (await router.chat(tools=[WEATHER], max_tokens=400)).json()
    [called] = body["choices"][0]["message"]["tool_calls"]
    assert called["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
    ]
    turns.append({"role": "tool", "tool_call_id": called["id"], "content": "sunny"})
    assert (await router.chat(messages=turns, tools=[WEATHER])).status_code == 200
    prompt = prompt_of(worker)
    assert call.replace("weather", "NAME").replace('{"city": "Rome"}', "ARGUMENTS") in prompt
    assert prompt.endswith(f"[assistant]{call}[tool]sunny")


@pytest.mark.parametrize("stream", [False, True])
async def test_required_makes_a_grammar_and_reads_what_it_gives(
    router: Router, worker: FakeDecodeWorker, stream: bool
) -> None:
    answers(worker, '[{"name":"weather","parameters":{"city":"Rome"}},{"name":"add","parameters":{}}]')
    fields = {"tools": [WEATHER, ADD], "tool_choice": "required", "max_tokens": 200, "stream": stream}
    response = await router.chat(**fields)
    if stream:
        calls = streamed_calls(response.text)
    else:
        calls = [call["function"] for call in response.json()["choices"][0]["message"]["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Rome"}),
        ("add", {}),
    ]
    grammar = worker.submits[0].sequence.sampling.grammar
    assert grammar.kind == common_pb2.GRAMMAR_KIND_JSON_SCHEMA
    assert grammar.is_compact
    schema = json.loads(grammar.text)
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert names == ["weather", "add"]
    city = schema["$defs"]["tool0"]["properties"]["city"]
    assert city == {"$ref": "#/$defs/tool0/$defs/City"}
    assert "maxItems" not in schema
    await router.chat(**{**fields, "parallel_tool_calls": False})
    assert json.loads(worker.submits[1].sequence.sampling.grammar.text)["maxItems"] == 1


async def test_a_named_tool_is_called_whatever_the_model_says(
    router: Router, worker: FakeDecodeWorker
) -> None:
    answers(worker, '{"city":"Rome"}')
    choice = {"type": "function", "function": {"name": "weather"}}
    body = (await router.chat(tools=[ADD, WEATHER], tool_choice=choice, max_tokens=200)).json()
    [call] = body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city":"Rome"}'}
    schema = json.loads(worker.submits[0].sequence.sampling.grammar.text)
    assert schema == WEATHER["function"]["parameters"]


@pytest.mark.parametrize("tokens_per_update", [1, 5])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_thought_that_the_prompt_opened_is_split_off_and_counted(
    make_router: RouterFactory, tmp_path: Path, stream: bool, tokens_per_update: int
) -> None:
    router, worker = await router_with(make_router, tmp_path, THINKING_TEMPLATE)
    answers(worker, "Let me see.\n</think>\n\nFour.", tokens_per_update)
    response = await router.chat(
        max_tokens=100, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {})
    )
    if stream:
        deltas = [c["choices"][0]["delta"] for c in events(response.text) if c["choices"]]
        message = {
            name: "".join(delta.get(name) or "" for delta in deltas)
            for name in ("content", "reasoning", "reasoning_content")
        }
        usage = events(response.text)[-1]["usage"]
    else:
        message, usage = response.json()["choices"][0]["message"], response.json()["usage"]
    assert message["content"] == "Four."
    assert message["reasoning"] == message["reasoning_content"] == "Let me see."
    assert "completion_tokens_details" in usage


async def test_structure_waits_for_the_end_of_a_thought(make_router: RouterFactory, tmp_path: Path) -> None:
    router, worker = await router_with(make_router, tmp_path, THINKING_TEMPLATE)
    await router.chat(response_format={"type": "json_object"})
    grammar = worker.submits[0].sequence.sampling.grammar
    assert list(grammar.begin_after) == ids("</think>")


@pytest.mark.parametrize(
    ("settings", "fields", "shown"),
    [
        ({"reasoning_field": "reasoning"}, {}, {"reasoning"}),
        ({"reasoning_field": "reasoning_content"}, {}, {"reasoning_content"}),
        ({}, {"include_reasoning": False}, set()),
        ({"reasoning_parser": "none"}, {}, set()),
    ],
)
async def test_where_thoughts_are_shown_can_be_chosen(
    make_router: RouterFactory, tmp_path: Path, settings: Any, fields: Any, shown: set[str]
) -> None:
    router, worker = await router_with(make_router, tmp_path, THINKING_TEMPLATE, **settings)
    answers(worker, "a</think>b")
    message = (await router.chat(**fields, max_tokens=50)).json()["choices"][0]["message"]
    assert set(message) - {"role", "content"} == shown


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "JSON_OBJECT", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "JSON_SCHEMA",
            json.dumps(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "JSON_SCHEMA", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "JSON_SCHEMA", json.dumps(SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, "REGEX", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "CHOICE", '["a", "b"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "EBNF", 'root ::= "a"'),
        ({"structured_outputs": {"json_object": True}}, "JSON_OBJECT", ""),
        ({"guided_json": SCHEMA}, "JSON_SCHEMA", json.dumps(SCHEMA)),
        ({"guided_regex": "a+"}, "REGEX", "a+"),
        ({"guided_choice": ["a", "b"]}, "CHOICE", '["a", "b"]'),
        ({"guided_grammar": 'root ::= "a"'}, "EBNF", 'root ::= "a"'),
        ({"json_schema": json.dumps(SCHEMA)}, "JSON_SCHEMA", json.dumps(SCHEMA)),
        ({"regex": "a+"}, "REGEX", "a+"),
        ({"ebnf": 'root ::= "a"'}, "EBNF", 'root ::= "a"'),
    ],
    ids=str,
)
async def test_every_way_to_ask_for_structure_means_the_same_to_workers(
    router: Router, worker: FakeDecodeWorker, fields: dict[str, Any], kind: str, text: str
) -> None:
    assert (await router.chat(**fields)).status_code == 200
    assert (await router.complete(**fields)).status_code == 200
    for submit in worker.submits:
        grammar = submit.sequence.sampling.grammar
        assert common_pb2.GrammarKind.Name(grammar.kind) == f"GRAMMAR_KIND_{kind}"
        assert grammar.text == text
        assert not grammar.begin_after


async def test_whitespace_can_be_forbidden_in_any_structure(router: Router, worker: FakeDecodeWorker) -> None:
    options = {"disable_any_whitespace": True}
    await router.chat(structured_outputs=options, response_format={"type": "json_object"})
    await router.chat(structured_outputs={**options, "json": SCHEMA})
    assert [submit.sequence.sampling.grammar.is_compact for submit in worker.submits] == [True, True]


async def test_text_needs_no_grammar(router: Router, worker: FakeDecodeWorker) -> None:
    await router.chat(response_format={"type": "text"})
    assert not worker.submits[0].sequence.sampling.HasField("grammar")
