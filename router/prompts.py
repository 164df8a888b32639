"""From what a client sent as its prompt to token ids."""

from __future__ import annotations

from typing import Any

from router.api_types import ChatMessage, ChatRequest, CompletionRequest
from router.chat_template import ChatTemplate
from router.generation import Prompt, refuse_too_long
from router.tokenizer import Tokenizer
from servicekit.errors import InvalidRequest


class PromptReader:
    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    async def read_chat(self, request: ChatRequest, max_model_len: int) -> list[Prompt]:
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        continues = bool(request.continue_final_message)
        if continues and request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message excludes add_generation_prompt", param="continue_final_message"
            )
        text = self._chat_template.render(
            [_template_message(message) for message in request.messages],
            add_generation_prompt=request.add_generation_prompt is not False and not continues,
            continue_final_message=continues,
            variables=request.chat_template_kwargs,
        )
        # The template has written the special tokens.
        return [await self._read_text(text, False, max_model_len)]

    async def read_completion(self, request: CompletionRequest, max_model_len: int) -> list[Prompt]:
        given = request.prompt
        parts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        adds_special = request.add_special_tokens is not False
        return [
            await self._read_text(part, adds_special, max_model_len)
            if isinstance(part, str)
            else self._read_ids(part)
            for part in parts
        ]

    async def _read_text(self, text: str, adds_special_tokens: bool, max_model_len: int) -> Prompt:
        refuse_too_long(self._tokenizer.min_tokens(text), max_model_len)  # before work in proportion to it
        token_ids = await self._tokenizer.encode(text, adds_special_tokens=adds_special_tokens)
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        return Prompt(token_ids=token_ids, text=text)

    def _read_ids(self, token_ids: list[int]) -> Prompt:
        if max(token_ids) >= self._tokenizer.vocab_size:
            raise InvalidRequest(
                f"prompt: token ids must be in [0, {self._tokenizer.vocab_size})", param="prompt"
            )
        return Prompt(token_ids=token_ids, text=None)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    extra = message.model_extra or {}
    if content is None and not (message.role == "assistant" and extra.get("tool_calls")):
        raise InvalidRequest(f"a {message.role} message needs content", param="messages")
    return {**extra, "role": message.role, "content": content}
