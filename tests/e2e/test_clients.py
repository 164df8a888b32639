"""The official clients against a whole stack: what a program written for OpenAI or Anthropic sees.

The model's weights are random, so that whatever makes sense in an answer was made by a grammar.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.e2e.conftest import random_prompt
from tests.e2e.stack import Stack

HI: Any = [{"role": "user", "content": "Which way to the station?"}]

# Random weights like whitespace, which JSON allows between its parts.
COMPACT: Any = {"structured_outputs": {"disable_any_whitespace": True}}


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")  # random weights would go on with properties of their own

    turn: Literal["left", "right", "straight"]
    num_meters: Literal[10, 50, 100]


class Way(BaseModel):
    steps: list[Step] = Field(min_length=2, max_length=2)


STEP_TOOL = openai.pydantic_function_tool(Step, name="walk")
STOP_TOOL: Any = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}}


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        yield client


def test_streamed_and_whole_answers_agree(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_many_asynchronous_streams_at_once(stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, index: int) -> int:
        stream = await client.completions.create(
            model="tiny",
            prompt=f"Question {index}",
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return len([chunk async for chunk in stream])

    async def ask_all() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, index) for index in range(16)))

    assert all(asyncio.run(ask_all()))


def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="tiny", messages=HI, response_format=Way, max_tokens=300, extra_body=COMPACT
    )
    [choice] = completion.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Way)
    assert choice.message.content == choice.message.parsed.model_dump_json()
    response = client.responses.parse(
        model="tiny", input="Which way?", text_format=Step, max_output_tokens=2000
    )
    assert isinstance(response.output_parsed, Step)


def test_a_required_tool_is_called_with_valid_arguments(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "tools": [STEP_TOOL], "max_tokens": 200}
    fields |= {"tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.function.name == "walk"
        Step.model_validate_json(call.function.arguments)


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "walk"}}
    completion = client.chat.completions.create(
        model="tiny", messages=HI, tools=[STOP_TOOL, STEP_TOOL], tool_choice=choice, max_tokens=200
    )
    assert completion.choices[0].message.tool_calls is not None
    [call] = completion.choices[0].message.tool_calls
    Step.model_validate_json(call.function.arguments)


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"guided_choice": ["left", "right"]}, ["left", "right"]),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, ["yes!", "no!"]),
        ({"ebnf": 'root ::= "a" ("b" | "c")'}, ["ab", "ac"]),
    ],
    ids=str,
)
def test_other_structures_are_obeyed(client: openai.OpenAI, fields: Any, accepted: list[str]) -> None:
    for index in range(4):
        text = client.completions.create(
            model="tiny", prompt="go", max_tokens=20, seed=index, extra_body=fields
        )
        assert text.choices[0].text in accepted


@pytest.mark.parametrize(
    "fields", [{"regex": "(unclosed"}, {"ebnf": "no grammar"}, {"guided_json": {"type": "nonsense"}}], ids=str
)
def test_a_structure_that_cannot_be_read_is_the_client_s_mistake(client: openai.OpenAI, fields: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="go", max_tokens=5, extra_body=fields)


def test_branches_of_a_prompt_compute_it_once(stack: Stack, client: openai.OpenAI) -> None:
    workers = [*stack.processes("prefill"), *stack.processes("decode")]

    def num_computed() -> float:
        return sum(stack.metrics(worker)["baton_engine_prefill_tokens_total"] for worker in workers)

    before = num_computed()
    prompt = random_prompt(77, 200)
    completion = client.completions.create(
        model="tiny", prompt=prompt, n=4, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert len({choice.text for choice in completion.choices}) > 1
    # Each branch after the first computes at most its last block, which it shares with nobody.
    assert 200 <= num_computed() - before <= 200 + 3 * 16


def test_scores_of_a_prompt_as_lm_eval_asks_for_them(client: openai.OpenAI) -> None:
    prompts = [random_prompt(5, 20), random_prompt(6, 31)]
    completion = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice, prompt in zip(completion.choices, prompts, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.token_logprobs) == len(prompt)
        assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0


def test_responses_stream_and_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "input": "Which way?", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**fields)
    streamed = "".join(
        event.delta
        for event in client.responses.create(**fields, stream=True)
        if event.type == "response.output_text.delta"
    )
    assert streamed == whole.output_text
    assert whole.status in ("completed", "incomplete")  # random weights may end or be cut


def test_anthropic_messages_whole_streamed_and_with_a_tool(claude: anthropic.Anthropic) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "max_tokens": 16, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert final.stop_reason == whole.stop_reason in ("max_tokens", "end_turn")
    tool: Any = {"name": "walk", "input_schema": Step.model_json_schema()}
    message = claude.messages.create(
        model="tiny", messages=HI, max_tokens=200, tools=[tool], tool_choice={"type": "tool", "name": "walk"}
    )
    [block] = message.content
    assert block.type == "tool_use"
    Step.model_validate(block.input)
    assert message.stop_reason == "tool_use"
    count = claude.messages.count_tokens(model="tiny", messages=HI)
    assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_langchain_gets_structured_output(stack: Stack) -> None:
    import httpx
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:
        chat = ChatOpenAI(
            model="tiny", base_url=f"{stack.url}/v1", api_key="none", http_client=http, extra_body=COMPACT
        )
        assert isinstance(chat.with_structured_output(Way).invoke("Which way?"), Way)
        plain = ChatOpenAI(model="tiny", base_url=f"{stack.url}/v1", api_key="none", http_client=http)
        forced = plain.bind_tools([STEP_TOOL], tool_choice="walk").invoke("Walk!")
    [call] = forced.tool_calls
    Step.model_validate(call["args"])
    assert json.dumps(call["args"])


def test_nothing_is_left_behind(stack: Stack) -> None:
    stack.assert_no_block_is_lost()
