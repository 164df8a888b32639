"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from router.answer_format import Answer, AnswerContext, CompletionFormat, merged, sse_event
from router.choice import Choice, ChoiceDelta
from router.logprobs import chat_logprobs, prompt_logprobs
from router.output.chat_output import ChatOutput, whole_output
from router.output.events import Content, OutputEvent, Reasoning, ToolStart


class ChatFormat(CompletionFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, context: AnswerContext) -> None:
        super().__init__(context)
        generation = self._generation
        plan = generation.output
        self._outputs: list[ChatOutput] = [plan.build() for _ in generation.sampling] if plan else []
        self._reasoning_fields = context.reasoning_fields if generation.shows_reasoning else ()

    def opening(self, choices: Sequence[Choice]) -> bytes:
        """The role alone, so that nobody takes it for the first token."""
        usage = {}
        if self._generation.has_continuous_usage:
            so_far = self.usage(choices)
            nothing_yet = {"completion_tokens": 0, "total_tokens": so_far["prompt_tokens"]}
            usage = {"usage": {**so_far, **nothing_yet}}
        return b"".join([self._opening(choice, usage) for choice in choices])

    def whole(self, answers: Sequence[Answer]) -> bytes:
        generation = self._generation
        if generation.returns_token_ids:
            self._head["prompt_token_ids"] = list(generation.prompts[0].token_ids)
        if generation.has_prompt_logprobs:
            tokens = merged(answers[0][1]).prompt_logprobs
            self._head["prompt_logprobs"] = prompt_logprobs(tokens, self._tokenizer.token_bytes)
        return super().whole(answers)

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        num_reasoning = sum(output.num_reasoning_tokens for output in self._outputs)
        details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning}}
        return {**super().usage(choices), **(details if self._outputs else {})}

    def _opening(self, choice: Choice, usage: dict[str, Any]) -> bytes:
        choice_json: dict[str, Any] = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
        choice_json |= {"logprobs": None, "finish_reason": None}
        event = {**self._head, "choices": [choice_json], **usage}
        if self._generation.returns_token_ids:
            event["prompt_token_ids"] = list(self._generation.prompts[choice.prompt_index].token_ids)
        return sse_event(event)

    def _plain_chunk(self, index: int, text: str) -> bytes:
        return (
            b'%b,"choices":[{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}\n\n'
            % (
                self._plain_head,
                index,
                orjson.dumps(text),
            )
        )

    def _chunk_choice(self, choice: Choice, delta: ChoiceDelta) -> dict[str, Any] | None:
        delta_json = self._delta(self._events(choice, delta))
        if not delta_json and not self._has_news(delta):
            return None
        choice_json = {
            "index": choice.index,
            "delta": delta_json,
            "logprobs": self._logprobs([delta]),
            "finish_reason": self._finish_reason(choice, delta),
        }
        return self._with_ends(choice_json, delta)

    def _whole_choice(self, choice: Choice, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        whole = merged(deltas)
        choice_json = {
            "index": choice.index,
            "message": self._message(self._events(choice, whole)),
            "logprobs": self._logprobs(deltas),
            "finish_reason": self._finish_reason(choice, whole),
        }
        return self._with_ends(choice_json, whole)

    def _events(self, choice: Choice, delta: ChoiceDelta) -> list[OutputEvent]:
        if not self._outputs:
            return [Content(delta.text)] if delta.text else []
        output = self._outputs[choice.index]
        events = output.push(delta.text, delta.token_ids)
        return [*events, *output.finish()] if delta.finish_reason else events

    def _delta(self, events: list[OutputEvent]) -> dict[str, Any]:
        """Events of one moment; the pieces of one call are put together, as some clients expect."""
        texts: dict[str, str] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, Content):
                texts["content"] = texts.get("content", "") + event.text
            elif isinstance(event, Reasoning):
                for name in self._reasoning_fields:
                    texts[name] = texts.get(name, "") + event.text
            elif isinstance(event, ToolStart):
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {"index": event.index, "id": event.call_id, "type": "function"}
                calls[event.index]["function"] = function
            else:
                call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        return {**texts, **({"tool_calls": list(calls.values())} if calls else {})}

    def _message(self, events: list[OutputEvent]) -> dict[str, Any]:
        whole = whole_output(events)
        message: dict[str, Any] = {"role": "assistant", "content": whole.content}
        if whole.reasoning:
            message |= dict.fromkeys(self._reasoning_fields, whole.reasoning)
        if whole.tool_calls:
            message["content"] = whole.content or None
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in whole.tool_calls
            ]
        return message

    def _finish_reason(self, choice: Choice, delta: ChoiceDelta) -> str | None:
        has_calls = bool(self._outputs) and self._outputs[choice.index].num_calls > 0
        return "tool_calls" if has_calls and delta.finish_reason == "stop" else delta.finish_reason

    def _logprobs(self, deltas: list[ChoiceDelta]) -> dict[str, Any] | None:
        if not self._generation.has_logprobs:
            return None
        tokens = [token for delta in deltas for token in delta.logprobs]
        return chat_logprobs(tokens, self._tokenizer.token_bytes)
