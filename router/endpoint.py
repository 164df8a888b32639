"""The endpoints that generate: what each takes, and how it answers. Behind them there is one path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from router.answer_format import AnswerContext, AnswerFormat
from router.api_types import ChatRequest, CompletionRequest
from router.chat_format import ChatFormat
from router.http_errors import error_body
from router.messages import translation as messages_translation
from router.messages.format import MessagesFormat, messages_error_body
from router.messages.types import MessagesRequest
from router.responses import translation as responses_translation
from router.responses.format import ResponsesFormat
from router.responses.types import ResponsesRequest
from router.text_format import TextFormat
from servicekit.errors import ServingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    path: str
    name: str  # in metrics and logs
    body: type[BaseModel]
    to_request: Callable[[Any], ChatRequest | CompletionRequest]  # of a body; may raise InvalidRequest
    new_format: Callable[[Any, AnswerContext], AnswerFormat]  # of a body
    error_body: Callable[[ServingError], dict[str, Any]] = error_body


CHAT = Endpoint(
    path="/v1/chat/completions",
    name="chat",
    body=ChatRequest,
    to_request=lambda body: body,
    new_format=lambda body, context: ChatFormat(context),
)
TEXT = Endpoint(
    path="/v1/completions",
    name="completions",
    body=CompletionRequest,
    to_request=lambda body: body,
    new_format=lambda body, context: TextFormat(context),
)
RESPONSES = Endpoint(
    path="/v1/responses",
    name="responses",
    body=ResponsesRequest,
    to_request=responses_translation.chat_request,
    new_format=ResponsesFormat,
)
MESSAGES = Endpoint(
    path="/v1/messages",
    name="messages",
    body=MessagesRequest,
    to_request=messages_translation.chat_request,
    new_format=lambda body, context: MessagesFormat(context),
    error_body=messages_error_body,
)
ENDPOINTS = (CHAT, TEXT, RESPONSES, MESSAGES)


def error_body_of(path: str) -> Callable[[ServingError], dict[str, Any]]:
    """How errors look at this path, to those who did not get as far as the endpoint."""
    return next((each.error_body for each in ENDPOINTS if each.path == path), error_body)
