"""From what a client sent as its prompt to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.api_types import ChatRequest, CompletionRequest, GenerationFields, pack_ids
from router.chat_messages import template_message
from router.chat_template import ChatTemplate
from router.generation import Prompt, refuse_too_long
from router.tokenizer import Tokenizer
from router.tool_prompt import ToolPrompt
from router.tool_types import Tool
from servicekit.errors import InvalidRequest

_ENDING_CHARS = 64  # enough to see whether the prompt opens a thought


class PromptReader:
    def __init__(
        self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, tool_prompt: ToolPrompt | None = None
    ) -> None:
        """`tool_prompt`: for a template that does not show tools."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._tool_prompt = tool_prompt

    async def read_chat(self, request: ChatRequest, max_model_len: int) -> list[Prompt]:
        text = self.render(request)
        # The template has written the special tokens.
        return [await self._read_text(text, request, max_model_len, adds_special_tokens=False)]

    async def read_completion(self, request: CompletionRequest, max_model_len: int) -> list[Prompt]:
        given = request.prompt
        parts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        return [
            await self._read_text(part, request, max_model_len, adds_special_tokens=True)
            if isinstance(part, str)
            else self._read_ids(part, request, max_model_len)
            for part in parts
        ]

    def render(self, request: ChatRequest) -> str:
        """The text of the prompt, by the chat template."""
        template = self._chat_template
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        continues = bool(request.continue_final_message)
        if continues and request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message excludes add_generation_prompt", param="continue_final_message"
            )
        tools = request.tools if request.tools and request.tool_choice != "none" else []
        return template.render(
            self._messages(request, template, tools),
            add_generation_prompt=request.add_generation_prompt is not False and not continues,
            continue_final_message=continues,
            variables=_variables(request, tools),
        )

    def _messages(
        self, request: ChatRequest, template: ChatTemplate, tools: list[Tool]
    ) -> list[dict[str, Any]]:
        messages = [
            template_message(message, wants_argument_objects=template.wants_argument_objects)
            for message in request.messages
        ]
        if not tools or self._tool_prompt is None:
            return messages
        return self._tool_prompt.added_to(messages, tools)

    async def _read_text(
        self, text: str, request: GenerationFields, max_model_len: int, *, adds_special_tokens: bool
    ) -> Prompt:
        if request.add_special_tokens is not None:
            adds_special_tokens = request.add_special_tokens
        if request.truncate_prompt_tokens is None:
            refuse_too_long(self._tokenizer.min_tokens(text), max_model_len)  # before work that grows with it
        token_ids = await self._tokenizer.encode(text, adds_special_tokens=adds_special_tokens)
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        kept = _truncated(token_ids, request, max_model_len)
        is_whole = len(kept) == len(token_ids)
        return Prompt(token_ids=pack_ids(kept), text=text if is_whole else None, ending=text[-_ENDING_CHARS:])

    def _read_ids(self, token_ids: Sequence[int], request: GenerationFields, max_model_len: int) -> Prompt:
        if max(token_ids) >= self._tokenizer.vocab_size:
            raise InvalidRequest(
                f"prompt: token ids must be in [0, {self._tokenizer.vocab_size})", param="prompt"
            )
        return Prompt(token_ids=pack_ids(_truncated(token_ids, request, max_model_len)), text=None)


def _variables(request: ChatRequest, tools: list[Tool]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return {**variables, **(request.chat_template_kwargs or {})}


def _truncated(token_ids: Sequence[int], request: GenerationFields, max_model_len: int) -> Sequence[int]:
    """The end of the prompt, as truncate_prompt_tokens asks."""
    num_kept = request.truncate_prompt_tokens
    if num_kept is None:
        return token_ids
    if num_kept == 0:
        raise InvalidRequest("truncate_prompt_tokens must be -1 or above 0", param="truncate_prompt_tokens")
    if num_kept < 0:
        num_kept = max(1, max_model_len - max(1, request.max_tokens or 1))
    return token_ids[-num_kept:]
