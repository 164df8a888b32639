"""Which parsers a model gets, and that what they look for is not hidden from them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from router.output.rules import OutputRules, detect_reasoning_parser, detect_tool_parser
from router.structure import Structure
from router.tokenizer import Tokenizer
from router.tool_types import FunctionTool, Tool
from router.tool_use import ToolUse
from tests.fakes.tiny_tokenizer import build_tokenizer

# What tells the templates of these families apart, cut out of them.
QWEN = "{{- '<tool_call>\\n{\"name\": \"' }}{%- if '</think>' in content %}"
LLAMA3 = "{{- '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}{# ipython #}"
DEEPSEEK_R1 = (
    "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}{% set c = c.split('</think>') %}"
)
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (QWEN, "hermes", "think"),
        (LLAMA3, "llama3", "none"),
        ("<|python_tag|>", "llama3", "none"),
        (DEEPSEEK_R1, "deepseek", "think"),
        (PLAIN, "hermes", "none"),
        (None, "hermes", "none"),
    ],
)
def test_parsers_are_found_by_the_template(template: str | None, tools: str, reasoning: str) -> None:
    assert detect_tool_parser(template) == tools
    assert detect_reasoning_parser(template) == reasoning


@pytest.mark.parametrize(
    ("parser", "prompt", "is_open"),
    [
        ("think", "[assistant]<think>\n", True),
        ("think", "[assistant]", False),
        ("think", "[assistant]<think>\n\n</think>\n\n", False),
        ("think", "[user]what is <think>?[assistant]", False),
        ("deepseek_r1", "[assistant]", True),
        ("deepseek_r1", "[assistant]</think>", False),
        ("none", "[assistant]<think>\n", False),
    ],
)
def test_a_prompt_may_open_a_thought(parser: str, prompt: str, is_open: bool) -> None:
    rules = OutputRules(tools="none", reasoning=parser)  # type: ignore[arg-type]
    assert rules.opens_thought(prompt) is is_open


def test_without_parsers_answers_are_plain_text() -> None:
    rules = OutputRules(tools="none", reasoning="none")
    tool = Tool(type="function", function=FunctionTool(name="add"))
    assert rules.output_plan(None, "") is None
    assert rules.output_plan(ToolUse(mode="auto", tools=(tool,), allows_parallel=True), "") is None
    # A grammar makes the call: no parser of the model's own is needed.
    assert rules.output_plan(ToolUse(mode="required", tools=(tool,), allows_parallel=True), "") is not None


def test_markers_that_are_special_tokens_reach_the_parser() -> None:
    raw = build_tokenizer()
    raw.add_special_tokens([AddedToken("<tool_call>", special=True), AddedToken("<other>", special=True)])
    tokenizer = Tokenizer(raw)
    token_ids = tokenizer.ids_of("<tool_call>hello<other>")
    hidden = tokenizer.detokenizer()
    shown = tokenizer.detokenizer(shown_tokens=("<tool_call>", "</think>"))
    assert hidden.push(token_ids) + hidden.flush() == "hello"
    assert shown.push(token_ids) + shown.flush() == "<tool_call>hello"


def test_a_structure_after_a_thought_keeps_everything_else() -> None:
    structure = Structure(kind="regex", text="a+", is_compact=True).after((7, 8))
    grammar = structure.to_pb()
    assert (grammar.text, grammar.is_compact, list(grammar.begin_after)) == ("a+", True, [7, 8])
