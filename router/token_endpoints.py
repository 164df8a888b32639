"""Endpoints that only need a tokenizer: /tokenize, /detokenize, /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from router.api_types import ChatRequest
from router.caller import Caller, caller_of
from router.generation_response import Serving
from router.http_errors import ClientGone, error_body, error_response
from router.messages.format import messages_error_body
from router.messages.translation import prompt_request
from router.messages.types import CountTokensRequest
from router.request_body import parse_body, read_body
from router.token_types import DetokenizeRequest, TokenizeRequest
from servicekit.errors import InvalidRequest, ServingError

T = TypeVar("T", bound=BaseModel)

TOKEN_BODIES: dict[str, type[BaseModel]] = {
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
}


def add_token_endpoints(app: FastAPI, serving: Serving) -> None:
    async def answer(
        request: Request,
        kind: type[T],
        serve: Callable[[Serving, T, Caller], Awaitable[dict[str, Any]]],
        error_body: Callable[[ServingError], dict[str, Any]] = error_body,
    ) -> Response:
        try:
            body = await read_body(
                request, serving.settings.max_body_bytes, serving.settings.client_timeout_s
            )
            parsed = parse_body(kind, body, rejects_unknown=serving.settings.rejects_unknown_fields)
            content = orjson.dumps(await serve(serving, parsed, caller_of(request)))
        except ClientGone:
            return Response()
        except ServingError as error:
            return error_response(error, error_body)
        return Response(content, media_type="application/json")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await answer(request, TokenizeRequest, _tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await answer(request, DetokenizeRequest, _detokenize)

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
        """What a client needs that tokenizes by /tokenize: special tokens and the chat template."""
        served = serving.models.named(model, caller_of(request))
        return {
            **served.model_dir.special_tokens,
            "chat_template": served.model_dir.chat_template,
            "model_max_length": served.max_model_len,
        }

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await answer(request, CountTokensRequest, _count_tokens, messages_error_body)


async def _tokenize(serving: Serving, request: TokenizeRequest, caller: Caller) -> dict[str, Any]:
    model = serving.models.named(request.model, caller)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give prompt or messages", param="prompt")
    if request.messages is None:
        text, adds_special = request.prompt or "", request.add_special_tokens is not False
    else:
        chat = ChatRequest(
            messages=request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
            tools=request.tools,
        )
        text, adds_special = model.prompts.render(chat), bool(request.add_special_tokens)
    token_ids = await model.tokenizer.encode(text, adds_special_tokens=adds_special)
    strings = [model.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
    return {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": token_ids,
        "token_strs": strings if request.return_token_strs else None,
    }


async def _detokenize(serving: Serving, request: DetokenizeRequest, caller: Caller) -> dict[str, Any]:
    model = serving.models.named(request.model, caller)
    token_ids = model.generations.checked_ids(request.tokens, "tokens")
    return {"prompt": model.tokenizer.decode(token_ids, skips_special_tokens=False)}


async def _count_tokens(serving: Serving, request: CountTokensRequest, caller: Caller) -> dict[str, Any]:
    model = serving.models.named(request.model, caller)
    text = model.prompts.render(prompt_request(request))
    return {"input_tokens": len(await model.tokenizer.encode(text, adds_special_tokens=False))}
