"""Which parsers read the answers of a model, and of one request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from router.output.chat_output import ChatOutput, ReasoningTokens, ThoughtTokens
from router.output.deepseek import BEGIN_CALLS, DeepseekCalls
from router.output.forced_calls import NamedCall, RequiredCalls
from router.output.hermes import BEGIN, HermesCalls
from router.output.llama3 import PYTHON_TAG, Llama3Calls
from router.output.reasoning import END_THINK, THINK, ReasoningSplit
from router.output.tool_parser import ToolParser
from router.tool_use import ToolUse

ToolParserName = Literal["auto", "none", "hermes", "llama3", "deepseek"]
ReasoningParserName = Literal["auto", "none", "think", "deepseek_r1"]
TOOL_PARSERS = get_args(ToolParserName)
REASONING_PARSERS = get_args(ReasoningParserName)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """Of one model."""

    tools: ToolParserName  # never "auto"
    reasoning: ReasoningParserName  # never "auto"
    tags: ThoughtTokens = ThoughtTokens(None, None)

    def opens_thought(self, prompt_text: str) -> bool:
        """The answer to this prompt begins inside a thought."""
        end = prompt_text.rstrip()
        if self.reasoning == "none" or end.endswith(END_THINK):
            return False
        return self.reasoning == "deepseek_r1" or end.endswith(THINK)

    def output_plan(self, tool_use: ToolUse | None, prompt_text: str) -> OutputPlan | None:
        """None when every answer is plain text."""
        parser = self._tool_parser(tool_use) if tool_use is not None else None
        if parser is None and self.reasoning == "none":
            return None
        return OutputPlan(
            new_tool_parser=parser,
            allows_parallel=tool_use is None or tool_use.allows_parallel,
            reads_reasoning=self.reasoning != "none",
            is_open=self.opens_thought(prompt_text),
            tags=self.tags,
        )

    def _tool_parser(self, tool_use: ToolUse) -> Callable[[], ToolParser] | None:
        if tool_use.mode == "named":
            return lambda: NamedCall(tool_use.names[0])
        if tool_use.mode == "required":
            return RequiredCalls
        names = frozenset(tool_use.names)
        styles: dict[str, Callable[[], ToolParser]] = {
            "hermes": HermesCalls,
            "deepseek": DeepseekCalls,
            "llama3": lambda: Llama3Calls(names),
        }
        return styles.get(self.tools)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPlan:
    """How the answers of one request are read."""

    new_tool_parser: Callable[[], ToolParser] | None
    allows_parallel: bool
    reads_reasoning: bool
    is_open: bool  # the prompt ended inside a thought
    tags: ThoughtTokens

    @property
    def markers(self) -> tuple[str, ...]:
        """What the detokenizer must show although they may be special tokens."""
        tools = self.new_tool_parser().markers if self.new_tool_parser else ()
        return (*tools, THINK, END_THINK) if self.reads_reasoning else tools

    def build(self) -> ChatOutput:
        """For one answer."""
        reasoning = ReasoningSplit(is_open=self.is_open) if self.reads_reasoning else None
        counter = ReasoningTokens(self.tags, is_open=self.is_open) if self.reads_reasoning else None
        return ChatOutput(
            reasoning,
            self.new_tool_parser() if self.new_tool_parser else None,
            allows_parallel=self.allows_parallel,
            reasoning_tokens=counter,
        )


def new_output(plan: OutputPlan | None) -> ChatOutput:
    """For one answer; without a plan all of it is content."""
    return plan.build() if plan is not None else ChatOutput(None, None)


def detect_tool_parser(chat_template: str | None) -> ToolParserName:
    """By the way in which the template writes calls; hermes where it writes none (router/tool_prompt.py)."""
    template = chat_template or ""
    if BEGIN_CALLS in template:
        return "deepseek"
    is_llama3 = PYTHON_TAG in template or ('"parameters": ' in template and "ipython" in template)
    return "llama3" if is_llama3 and BEGIN not in template else "hermes"


def detect_reasoning_parser(chat_template: str | None) -> ReasoningParserName:
    return "think" if END_THINK in (chat_template or "") else "none"
