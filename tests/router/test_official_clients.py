"""The official Python clients of OpenAI and Anthropic, and LangChain, against the real application.

The worker is scripted, so that every kind of answer comes up; tests/e2e does the same with real models.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.fakes.fake_decode_worker import FakeDecodeWorker, cycling_script
from tests.fakes.tiny_tokenizer import CHAT_TEMPLATE
from tests.router.conftest import Router, RouterFactory
from tests.router.test_chat_output import THINKING_TEMPLATE, answers, prompt_of, router_with
from tests.router.test_generation_endpoints import ids

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
HI: Any = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    city: str


class City(BaseModel):
    name: str
    people: int


@pytest.fixture
async def router(make_router: RouterFactory, tmp_path: Path) -> Router:
    router, _ = await router_with(make_router, tmp_path, CHAT_TEMPLATE)
    return router


@pytest.fixture
async def openai_client(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{router.client.base_url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def anthropic_client(router: Router) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=str(router.client.base_url), api_key="none", max_retries=0
    ) as client:
        yield client


@asynccontextmanager
async def thinking_router(make_router: RouterFactory, tmp_path: Path) -> AsyncIterator[Router]:
    router, worker = await router_with(make_router, tmp_path / "thinking", THINKING_TEMPLATE)
    answers(worker, "Let me see.</think>\nFour.")
    yield router


class TestOpenAiResponses:
    async def test_text(self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker) -> None:
        answers(worker, "hello there")
        response = await openai_client.responses.create(model="test", input="hi", instructions="Be brief.")
        assert response.output_text == "hello there"
        assert (response.status, response.store) == ("completed", False)
        assert response.usage is not None
        assert response.usage.output_tokens == len(ids("hello there")) + 1
        assert prompt_of(worker) == "<s>[system]Be brief.\n[user]hi\n[assistant]"

    @pytest.mark.parametrize("tokens_per_update", [1, 4])
    async def test_stream(
        self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker, tokens_per_update: int
    ) -> None:
        answers(worker, f"I look. {CALL}", tokens_per_update)
        tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
        async with openai_client.responses.stream(model="test", input=HI, tools=[tool]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"
        assert [event.sequence_number for event in events] == sorted(e.sequence_number for e in events)
        message, call = final.output
        assert final.output_text == "I look."
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "weather",
            {"city": "Rome"},
        )
        assert message.type == "message"
        for kind in ("output_item.added", "output_item.done"):
            assert kinds.count(f"response.{kind}") == 2
        whole = await openai_client.responses.create(model="test", input=HI, tools=[tool])
        assert [item.type for item in whole.output] == ["message", "function_call"]

    async def test_a_turn_with_a_tool_result(
        self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker
    ) -> None:
        answers(worker, CALL)
        tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": None}
        first = await openai_client.responses.create(model="test", input=HI, tools=[tool])
        [call] = first.output
        assert call.type == "function_call"
        answers(worker, "sunny")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
        turns: Any = [*HI, call.model_dump(), result]
        second = await openai_client.responses.create(model="test", input=turns, tools=[tool])
        assert second.output_text == "sunny"
        assert "<tool_response>\n21 degrees\n</tool_response>" in prompt_of(worker)

    async def test_parsed_output(self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker) -> None:
        answers(worker, '{"name": "Rome", "people": 3}')
        response = await openai_client.responses.parse(model="test", input="hi", text_format=City)
        assert response.output_parsed == City(name="Rome", people=3)
        assert json.loads(worker.submits[0].sequence.sampling.grammar.text)["required"] == ["name", "people"]

    async def test_an_answer_that_was_cut_is_incomplete(
        self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker
    ) -> None:
        response = await openai_client.responses.create(model="test", input="hi", max_output_tokens=4)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"

    async def test_thoughts_are_an_item(self, make_router: RouterFactory, tmp_path: Path) -> None:
        async with thinking_router(make_router, tmp_path) as router:
            client = openai.AsyncOpenAI(base_url=f"{router.client.base_url}/v1", api_key="none")
            response = await client.responses.create(model="test", input="2+2?")
            async with client.responses.stream(model="test", input="2+2?") as stream:
                streamed = [event async for event in stream if event.type == "response.reasoning_text.delta"]
            await client.close()
        thought = response.output[0]
        assert thought.type == "reasoning"
        assert thought.content is not None
        assert thought.content[0].text == "Let me see."
        assert response.output_text == "Four."
        assert "".join(event.delta for event in streamed) == "Let me see."

    @pytest.mark.parametrize(
        "fields",
        [
            {"previous_response_id": "resp_1"},
            {"background": True},
            {"tools": [{"type": "web_search"}]},
            {"input": []},
            {"input": [{"type": "item_reference", "id": "x"}]},
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ],
        ids=str,
    )
    async def test_what_is_not_served_is_refused(
        self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await openai_client.responses.create(**{"model": "test", "input": "hi", **fields})
        assert caught.value.param in fields
        assert not worker.submits

    async def test_a_worker_s_failure_ends_the_stream(
        self, router: Router, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker
    ) -> None:
        worker.hold_after = 3
        stream = await openai_client.responses.create(model="test", input="hi", stream=True)
        kinds = []
        async for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta" and not worker.num_links_broken:
                for choice_flow in list(router.fleet.decode_workers()[0][1]._streams.values()):
                    choice_flow.fail(openai_failure())
                await worker.release()
        assert kinds[-1] == "response.failed"


def openai_failure() -> Exception:
    from servicekit.errors import ServingError

    return ServingError("broken")


class TestOpenAiChat:
    async def test_streamed_tools(self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker) -> None:
        answers(worker, f"I look. {CALL}")
        tool = openai.pydantic_function_tool(Weather, name="weather")
        async with openai_client.chat.completions.stream(model="test", messages=HI, tools=[tool]) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        [choice] = final.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}
        assert {"content.delta", "tool_calls.function.arguments.delta"} <= kinds

    async def test_parsed_output(self, openai_client: openai.AsyncOpenAI, worker: FakeDecodeWorker) -> None:
        answers(worker, '{"name": "Rome", "people": 3}')
        completion = await openai_client.chat.completions.parse(
            model="test", messages=HI, response_format=City
        )
        assert completion.choices[0].message.parsed == City(name="Rome", people=3)

    async def test_errors_have_their_classes(self, openai_client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            await openai_client.chat.completions.create(model="gpt-17", messages=HI)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await openai_client.chat.completions.create(model="test", messages=HI, temperature=9)
        assert bad.value.param == "temperature"

    async def test_the_synchronous_client(self, router: Router, worker: FakeDecodeWorker) -> None:
        answers(worker, "hello there")

        def ask() -> tuple[str | None, str, list[str]]:
            with openai.OpenAI(base_url=f"{router.client.base_url}/v1", api_key="none") as client:
                whole = client.chat.completions.create(model="test", messages=HI)
                stream = client.completions.create(model="test", prompt="hi", stream=True)
                text = "".join(chunk.choices[0].text for chunk in stream)
                return whole.choices[0].message.content, text, [card.id for card in client.models.list()]

        assert await asyncio.to_thread(ask) == ("hello there", "hello there", ["test"])


class TestAnthropic:
    async def test_text(self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker) -> None:
        answers(worker, "hello there")
        worker.num_hit_tokens = 4
        message = await anthropic_client.messages.create(
            model="test", max_tokens=10_000, system="Be brief.", messages=HI, extra_body={"top_k": 5}
        )
        assert [block.text for block in message.content if block.type == "text"] == ["hello there"]
        assert message.stop_reason == "end_turn"
        num_prompt = len(worker.submits[0].sequence.prompt_ids)
        assert message.usage.input_tokens == num_prompt - 4
        assert message.usage.cache_read_input_tokens == 4
        assert prompt_of(worker) == "<s>[system]Be brief.\n[user]hi\n[assistant]"
        assert worker.submits[0].sequence.sampling.top_k == 5

    @pytest.mark.parametrize("tokens_per_update", [1, 4])
    async def test_stream_with_a_tool(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker, tokens_per_update: int
    ) -> None:
        answers(worker, f"I look. {CALL}", tokens_per_update)
        tool: Any = {"name": "weather", "input_schema": PARAMETERS}
        fields: Any = {"model": "test", "max_tokens": 400, "messages": HI, "tools": [tool]}
        async with anthropic_client.messages.stream(**fields) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
        whole = await anthropic_client.messages.create(**fields)
        for message in (final, whole):
            text, call = message.content
            assert (text.type, call.type, message.stop_reason) == ("text", "tool_use", "tool_use")
            assert (call.name, call.input) == ("weather", {"city": "Rome"})
            assert call.id.startswith("toolu_")
        assert final.usage.output_tokens == whole.usage.output_tokens

    async def test_a_turn_with_a_tool_result(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker
    ) -> None:
        tool: Any = {"name": "weather", "input_schema": PARAMETERS}
        answers(worker, "sunny")
        turns: Any = [
            *HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "21 degrees"},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ]
        message = await anthropic_client.messages.create(
            model="test", max_tokens=100, messages=turns, tools=[tool]
        )
        assert message.content[0].text == "sunny"
        prompt = prompt_of(worker)
        assert "[assistant]I look.<tool_call>" in prompt
        assert "[user]<tool_response>\n21 degrees\n</tool_response>\n[user]Well?" in prompt

    @pytest.mark.parametrize(
        ("choice", "kind"), [({"type": "any"}, "array"), ({"type": "tool", "name": "weather"}, "object")]
    )
    async def test_forced_tools(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker, choice: Any, kind: str
    ) -> None:
        call = '{"city":"Rome"}'
        answers(worker, call if kind == "object" else f'[{{"name":"weather","parameters":{call}}}]')
        tool: Any = {"name": "weather", "input_schema": PARAMETERS}
        message = await anthropic_client.messages.create(
            model="test", max_tokens=100, messages=HI, tools=[tool], tool_choice=choice
        )
        [block] = message.content
        assert (block.type, block.input) == ("tool_use", {"city": "Rome"})
        assert json.loads(worker.submits[0].sequence.sampling.grammar.text)["type"] == kind

    async def test_stop_sequences_and_limits_are_named(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker
    ) -> None:
        worker.script = cycling_script(ids("go on and stop here, "))
        fields: Any = {"model": "test", "messages": HI}
        stopped = await anthropic_client.messages.create(**fields, max_tokens=100, stop_sequences=[" here"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " here")
        cut = await anthropic_client.messages.create(**fields, max_tokens=3)
        assert cut.stop_reason == "max_tokens"

    async def test_thoughts_are_a_block(self, make_router: RouterFactory, tmp_path: Path) -> None:
        async with thinking_router(make_router, tmp_path) as router:
            client = anthropic.AsyncAnthropic(base_url=str(router.client.base_url), api_key="none")
            message = await client.messages.create(model="test", max_tokens=100, messages=HI)
            await client.close()
        thought, text = message.content
        assert (thought.type, thought.thinking) == ("thinking", "Let me see.")
        assert (text.type, text.text) == ("text", "Four.")

    async def test_counted_tokens_are_those_of_the_prompt(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker
    ) -> None:
        tool: Any = {"name": "weather", "input_schema": PARAMETERS}
        fields: Any = {"model": "test", "messages": HI, "tools": [tool], "system": "Be brief."}
        count = await anthropic_client.messages.count_tokens(**fields)
        await anthropic_client.messages.create(**fields, max_tokens=5)
        assert count.input_tokens == len(worker.submits[0].sequence.prompt_ids)

    async def test_errors_have_their_classes(
        self, anthropic_client: anthropic.AsyncAnthropic, worker: FakeDecodeWorker
    ) -> None:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await anthropic_client.messages.create(model="gpt-17", max_tokens=5, messages=HI)
        assert missing.value.body["error"]["type"] == "not_found_error"
        image: Any = {"type": "image", "source": {"type": "url", "url": "http://x"}}
        with pytest.raises(anthropic.BadRequestError):
            await anthropic_client.messages.create(
                model="test", max_tokens=5, messages=[{"role": "user", "content": [image]}]
            )
        search: Any = {"type": "web_search_20250305", "name": "web_search"}
        with pytest.raises(anthropic.BadRequestError):
            await anthropic_client.messages.create(model="test", max_tokens=5, messages=HI, tools=[search])
        assert not worker.submits


async def test_langchain_calls_tools_and_streams(router: Router, worker: FakeDecodeWorker) -> None:
    from langchain_openai import ChatOpenAI

    http = httpx.AsyncClient()
    url = f"{router.client.base_url}/v1"
    chat = ChatOpenAI(model="test", base_url=url, api_key="none", http_async_client=http)
    answers(worker, f"I look. {CALL}")
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    answer = await chat.bind_tools([tool]).ainvoke("hi")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Rome"})]
    answers(worker, "hello there")
    assert "".join([chunk.text async for chunk in chat.astream("hi")]) == "hello there"
    answers(worker, '{"name": "Rome", "people": 3}')
    assert await chat.with_structured_output(City).ainvoke("hi") == City(name="Rome", people=3)
    await http.aclose()
