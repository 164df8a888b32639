"""One HTTP request from its body to the last byte of its answer."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.answer_format import DONE, AnswerFormat, sse_event
from router.api_types import ChatRequest, CompletionRequest
from router.caller import ANYBODY, Caller
from router.chat_format import ChatFormat
from router.choice import Choice, ChoiceDelta, deltas
from router.disconnect import DisconnectGuard
from router.drain import Drain
from router.fleet import Fleet
from router.generation import Generation, GenerationBuilder, refuse_long_prompts
from router.http_errors import ClientGone, error_body, error_response, error_status
from router.metrics import RouterMetrics
from router.model_dir import ModelDir
from router.overload import OverloadGuard
from router.prompts import PromptReader
from router.quota_gate import Demand, Grant, QuotaGate
from router.request_body import parse_body, read_body
from router.request_deadline import request_deadline
from router.request_flow import FlowLimits, FlowRequest, RequestFlow
from router.route_header import ROUTE_HEADER, route_header
from router.route_planner import PromptHashes, RoutePlanner
from router.settings import RouterSettings
from router.text_format import TextFormat
from router.tokenizer import Tokenizer
from router.tracing import end_request, trace_request
from servicekit.errors import InvalidRequest, ServingError
from servicekit.logging import get_logger
from servicekit.tracing import Tracer

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_FALLBACK_MODEL_LEN = 1 << 20  # no worker and no config.json says: workers refuse what they cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What every request needs; built once, in app.py."""

    settings: RouterSettings
    model_dir: ModelDir
    tokenizer: Tokenizer
    prompts: PromptReader
    generations: GenerationBuilder
    fleet: Fleet
    planner: RoutePlanner
    overload: OverloadGuard
    quotas: QuotaGate
    metrics: RouterMetrics
    drain: Drain
    tracer: Tracer

    @property
    def max_model_len(self) -> int:
        known = [self.fleet.max_model_len(), self.model_dir.max_position_embeddings]
        return min((length for length in known if length), default=_FALLBACK_MODEL_LEN)


class GenerationResponse(Response):
    """The whole exchange in one coroutine, so that one place sees it end, however that happens."""

    def __init__(
        self, serving: Serving, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> None:
        self._serving = serving
        self._request = request
        self._kind = kind
        self._accepted_at = time.monotonic()
        self._is_started = False
        self._caller: Caller = getattr(request.state, "caller", ANYBODY)
        self._grant = Grant({})
        self._choices: list[Choice] = []
        given = request.headers.get("x-request-id", "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._span = trace_request(serving.tracer, request, self._request_id, serving.settings.model_name)
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        try:
            with self._serving.drain.open_request():
                await self._answer(receive, send)
            outcome = "ok"
        except ClientGone:
            outcome = "disconnected"
            self._span.fail(outcome)
        except ServingError as error:
            outcome = str(error_status(error))
            self._span.fail(error)
            await self._fail(error, scope, receive, send)
        finally:
            self._end(outcome)

    async def _answer(self, receive: Receive, send: Send) -> None:
        settings = self._serving.settings
        body = await read_body(self._request, settings.max_body_bytes, settings.client_timeout_s)
        async with DisconnectGuard(receive):
            generation = await self._read(body)
            demand = Demand.of(
                sum(len(prompt.token_ids) for prompt in generation.prompts),
                [sampling.max_tokens for sampling in generation.sampling],
            )
            async with self._serving.quotas.admit(self._caller, demand, self._num_used_tokens) as self._grant:
                await self._generate(generation, send)

    async def _generate(self, generation: Generation, send: Send) -> None:
        self._choices = self._open_choices(generation)
        for choice in self._choices:
            await choice.flow.submit()
        format_class = ChatFormat if generation.kind == "chat" else TextFormat
        model_name = self._serving.settings.model_name
        answer = format_class(generation, self._serving.tokenizer, self._request_id, model_name)
        if generation.streams:
            await self._stream(generation, answer, send)
        else:
            await self._send_whole(answer, send)

    def _num_used_tokens(self) -> int:
        """Of the caller's quota: each prompt once it was computed for, and what was generated from it."""
        prompts = {
            choice.prompt_index: choice.flow.num_prompt_tokens
            for choice in self._choices
            if choice.flow.first_route is not None
        }
        return sum(prompts.values()) + sum(choice.num_tokens for choice in self._choices)

    async def _read(self, body: bytes) -> Generation:
        serving = self._serving
        request = parse_body(self._kind, body)
        if request.model not in (None, serving.settings.model_name):
            raise InvalidRequest(
                f"the model {request.model!r} does not exist", param="model", code="model_not_found"
            )
        max_model_len = serving.max_model_len
        if isinstance(request, ChatRequest):
            prompts = await serving.prompts.read_chat(request, max_model_len)
        else:
            prompts = await serving.prompts.read_completion(request, max_model_len)
        refuse_long_prompts(prompts, serving.settings.max_prompt_tokens)
        return serving.generations.build(request, prompts, max_model_len)

    def _open_choices(self, generation: Generation) -> list[Choice]:
        serving = self._serving
        settings = serving.settings
        deadline = request_deadline(self._request.headers, settings.request_timeout_s, self._accepted_at)
        limits = FlowLimits(
            max_retries=settings.max_retries,
            worker_timeout_s=settings.worker_timeout_s,
            overload=serving.overload,
        )
        hashes = [
            PromptHashes(prompt.token_ids, generation.cache_salt, self._caller.tenant)
            for prompt in generation.prompts
        ]
        choices = []
        for index, sampling in enumerate(generation.sampling):
            prompt_index = index // generation.num_choices
            flow_request = FlowRequest(
                request_id=self._request_id,
                prompt=hashes[prompt_index],
                sampling=sampling,
                accepted_at=self._accepted_at,
                deadline=deadline,
                priority=self._caller.priority,
                may_be_refused=index == 0,
                span=self._span,
            )
            flow = RequestFlow(flow_request, serving.fleet, serving.planner, serving.metrics, limits)
            detokenizer = serving.tokenizer.detokenizer(skips_special_tokens=generation.skips_special_tokens)
            choices.append(Choice(index, prompt_index, flow, detokenizer, generation))
        serving.metrics.in_flight.inc(len(choices))
        return choices

    async def _stream(self, generation: Generation, answer: AnswerFormat, send: Send) -> None:
        """The status waits for the first token: until then an error still gets its own."""
        async with aclosing(cast(Any, deltas(self._choices))) as stream:
            async for choice, delta in stream:
                chunk = answer.chunk(choice, delta, self._choices)
                if not self._is_started:
                    await self._start(
                        send, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")]
                    )
                    chunk = b"".join([answer.opening(each) for each in self._choices]) + chunk
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        tail = answer.usage_chunk(self._choices) if generation.includes_usage else b""
        await self._grant.settle()
        await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})

    async def _send_whole(self, answer: AnswerFormat, send: Send) -> None:
        parts: list[list[ChoiceDelta]] = [[] for _ in self._choices]
        async with aclosing(cast(Any, deltas(self._choices))) as stream:
            async for choice, delta in stream:
                parts[choice.index].append(delta)
        body = answer.whole(list(zip(self._choices, parts, strict=True)))
        await self._grant.settle()
        await self._start(send, b"application/json", [(b"content-length", b"%d" % len(body))])
        await send({"type": "http.response.body", "body": body})

    async def _start(self, send: Send, content_type: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._is_started = True
        route = self._choices[0].flow.first_route
        assert route is not None
        all_headers = [
            (b"content-type", content_type),
            (b"x-request-id", self._request_id.encode()),
            (ROUTE_HEADER, route_header(route.decision)),
            *[(name.encode(), value.encode()) for name, value in self._grant.headers.items()],
            *headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": all_headers})

    async def _fail(self, error: ServingError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_started:
            tail = sse_event(error_body(error)) + DONE
            await send({"type": "http.response.body", "body": tail, "more_body": False})
            return
        self._serving.metrics.refused(error)
        response = error_response(error, path=self._request.url.path)
        response.headers["x-request-id"] = self._request_id
        await response(scope, receive, send)

    def _end(self, outcome: str) -> None:
        metrics = self._serving.metrics
        for choice in self._choices:
            choice.flow.close()
        metrics.in_flight.dec(len(self._choices))
        end_request(self._span, self._choices, outcome)
        endpoint = "chat" if self._kind is ChatRequest else "completions"
        metrics.request_ended(endpoint, outcome)
        log.info(
            "request_ended",
            request_id=self._request_id,
            endpoint=endpoint,
            outcome=outcome,
            num_generated_tokens=sum(choice.num_tokens for choice in self._choices),
            elapsed_s=time.monotonic() - self._accepted_at,
            **({"caller": self._caller.key.name} if self._caller.key else {}),
        )
