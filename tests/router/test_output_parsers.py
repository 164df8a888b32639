"""Reasoning and tool calls found in text, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.output.chat_output import ChatOutput, ReasoningTokens, ThoughtTokens, WholeOutput, whole_output
from router.output.deepseek import (
    BEGIN_CALL,
    BEGIN_CALLS,
    END_CALL,
    END_CALLS,
    SEPARATOR,
    DeepseekCalls,
)
from router.output.forced_calls import NamedCall, RequiredCalls
from router.output.hermes import HermesCalls
from router.output.llama3 import Llama3Calls
from router.output.reasoning import ReasoningSplit
from router.output.tool_parser import ToolParser

NAMES = frozenset({"weather", "add"})
PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": HermesCalls,
    "llama3": lambda: Llama3Calls(NAMES),
    "deepseek": DeepseekCalls,
    "required": RequiredCalls,
    "named": lambda: NamedCall("weather"),
}


def read(pieces: Sequence[str], tools: ToolParser | None, **options: Any) -> WholeOutput:
    reasoning = ReasoningSplit(is_open=options.pop("is_open", False)) if "is_open" in options else None
    output = ChatOutput(reasoning, tools, **options)
    events = [event for piece in pieces for event in output.push(piece)]
    return whole_output([*events, *output.finish()])


def calls(whole: WholeOutput) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in whole.tool_calls]


def v3_call(name: str, arguments: str) -> str:
    return f"{BEGIN_CALL}function{SEPARATOR}{name}\n```json\n{arguments}\n```{END_CALL}"


ARGUMENTS = {"city": 'S\u00e3o "P\u00e3ulo" \\ {x}', "days": [1, {"a": None}]}
TEXT = json.dumps(ARGUMENTS)
TWO = [("weather", ARGUMENTS), ("add", {"a": 1})]
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>\n'
    '<tool_call>{"arguments":{"a":1},"name":"add"}</tool_call>',
    "hermes in a list": f'<tool_call>[{{"name": "weather", "arguments": {TEXT}}}, '
    '{"name": "add", "arguments": {"a": 1}}]</tool_call>',
    "hermes with arguments as a string": f'<tool_call>{{"name": "weather", "arguments": {json.dumps(TEXT)}}}'
    '</tool_call><tool_call>{"name": "add", "parameters": {"a": 1} }</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {TEXT}}}; {{"name": "add", "parameters": {{"a": 1}}}}',
    "llama3 after a tag": f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {TEXT}}}\n'
    '{"name": "add", "parameters": {"a": 1}}',
    "deepseek": f"{BEGIN_CALLS}{v3_call('weather', TEXT)}\n{v3_call('add', json.dumps({'a': 1}, indent=1))}"
    f"{END_CALLS}",
    "deepseek V3.1": f"{BEGIN_CALLS}{BEGIN_CALL}weather{SEPARATOR}{TEXT}{END_CALL}"
    f'{BEGIN_CALL}add{SEPARATOR}{{"a": 1}}{END_CALL}{END_CALLS}',
    "required": f'[{{"name": "weather", "parameters": {TEXT}}}, {{"name":"add","parameters":{{"a":1}}}}]',
}


def parser_of(style: str) -> ToolParser:
    return PARSERS[style.split()[0]]()


@pytest.mark.parametrize("style", WRITTEN)
def test_two_calls_are_found_and_nothing_is_said(style: str) -> None:
    whole = read([WRITTEN[style]], parser_of(style))
    assert calls(whole) == TWO
    assert whole.content == ""
    assert len({call.call_id for call in whole.tool_calls}) == 2


@pytest.mark.parametrize("style", WRITTEN)
def test_without_parallel_calls_the_first_remains(style: str) -> None:
    assert calls(read([WRITTEN[style]], parser_of(style), allows_parallel=False)) == TWO[:1]


@pytest.mark.parametrize("style", ["hermes", "deepseek", "deepseek V3.1"])
def test_words_before_and_after_calls_are_content(style: str) -> None:
    whole = read([f"Let me look.\n\n{WRITTEN[style]}\n\nDone."], parser_of(style))
    assert calls(whole) == TWO
    assert whole.content == "Let me look.\n\nDone."


@pytest.mark.parametrize("style", WRITTEN)
def test_arguments_come_before_the_call_is_complete(style: str) -> None:
    output = ChatOutput(None, parser_of(style))
    half = WRITTEN[style][: WRITTEN[style].index("days")]
    whole = whole_output(output.push(half))
    assert whole.tool_calls[0].name == "weather"
    assert ("P\\u00e3ulo" in whole.tool_calls[0].arguments) == ("string" not in style)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", ["hello", " hello {a} ", "1 < 2", "{", '{"name": 5}', '{"a": 1} and', "  "])
def test_plain_text_is_content_as_it_is(parser: str, text: str) -> None:
    if parser in ("named", "required"):
        return  # a grammar has seen to it
    assert read([text], PARSERS[parser]()).content == text
    assert read(list(text), PARSERS[parser]()).content == text


def test_json_that_is_no_call_of_a_tool_stays_content() -> None:
    text = '{"name": "Bob", "parameters": {"age": 3}} {"name": "add", "parameters": {}}'
    whole = read([text], Llama3Calls(NAMES))
    assert (whole.content, whole.tool_calls) == (text, [])


def test_a_named_call_takes_the_whole_answer_as_arguments() -> None:
    assert calls(read(list(TEXT), NamedCall("weather"))) == [("weather", ARGUMENTS)]


@pytest.mark.parametrize("style", ["hermes", "deepseek"])
def test_a_call_without_arguments_has_none(style: str) -> None:
    text = {
        "hermes": '<tool_call>{"name": "add"}</tool_call>',
        "deepseek": f"{BEGIN_CALLS}{BEGIN_CALL}function{SEPARATOR}add\n{END_CALL}{END_CALLS}",
    }[style]
    assert calls(read([text], parser_of(style))) == [("add", {})]


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nLet me see. \n</think>\n\nFour.", False, "Let me see.", "Four."),
        ("  <think>a</think>b", False, "a", "b"),
        ("Let me see.\n</think>\n\nFour.", True, "Let me see.", "Four."),
        ("Four. <think>no</think>", False, "", "Four. <think>no</think>"),
        (" Four.", False, "", " Four."),
        ("<think>\n\n</think>\n\nFour.", False, "", "Four."),
        ("<thin", False, "", "<thin"),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("a\n\nb</think>c </think>", True, "a\n\nb", "c </think>"),
    ],
)
def test_thoughts_are_split_off(text: str, is_open: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        whole = read(pieces, None, is_open=is_open)
        assert (whole.reasoning, whole.content) == (reasoning, content)


def test_calls_are_found_behind_a_thought_and_not_in_it() -> None:
    text = f"<tool_call>no</tool_call></think>\n{WRITTEN['hermes']}"
    whole = read(list(text), HermesCalls(), is_open=True)
    assert calls(whole) == TWO
    assert whole.reasoning == "<tool_call>no</tool_call>"
    assert whole.content == ""


@pytest.mark.parametrize(("is_open", "expected"), [(True, 3), (False, 0)])
def test_reasoning_tokens_are_counted_up_to_the_closing_tag(is_open: bool, expected: int) -> None:
    counter = ReasoningTokens(ThoughtTokens(begin_id=8, end_id=9), is_open=is_open)
    for token_ids in ([1], [2, 9, 3], [4]):
        counter.push(token_ids)
    assert counter.num_tokens == expected


FRAGMENTS = [
    "<tool_call>", "</tool_call>", '{"name": "add", ', '"arguments": {"a": "}\\""}', "}", "{", " ", "\n", ";",
    ",", "<think>", "</think>", "<|python_tag|>", BEGIN_CALLS, BEGIN_CALL, "function", SEPARATOR,
    "add\n```json\n", "```", END_CALL, END_CALLS, "word", "[", "]", '"parameters": "{\\"b\\": 1}"', '"',
    "<", "\\",
]  # fmt: skip


@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    cuts=st.lists(st.integers(min_value=1, max_value=12), max_size=40),
    parser=st.sampled_from([*PARSERS, None]),
    is_open=st.booleans(),
)
def test_any_cut_of_any_text_gives_the_same(
    fragments: list[str], cuts: list[int], parser: str | None, is_open: bool
) -> None:
    text = "".join(fragments)
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    whole, cut_whole = (
        read(parts, PARSERS[parser]() if parser else None, is_open=is_open)
        for parts in ([text], [*pieces, rest])
    )
    for output in (whole, cut_whole):
        for call in output.tool_calls:
            call.call_id = ""
    assert cut_whole == whole
