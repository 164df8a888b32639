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
from prometheus_client import Gauge
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.answer_format import AnswerContext, AnswerFormat
from router.api_types import ChatRequest, CompletionRequest
from router.caller import caller_of
from router.choice import Choice, ChoiceDelta, deltas
from router.direct_stream import open_direct_streams
from router.disconnect import DisconnectGuard
from router.drain import Drain
from router.endpoint import Endpoint
from router.fleet import Fleet
from router.generation import Generation
from router.http_errors import ClientGone, error_response, error_status
from router.http_protocol import stream_writer
from router.metrics import RouterMetrics
from router.quota_gate import Demand, Grant, QuotaGate
from router.request_body import parse_body, read_body
from router.request_deadline import request_deadline
from router.request_flow import Branches, FlowLimits, FlowRequest, RequestFlow
from router.route_header import ROUTE_HEADER, route_header
from router.route_planner import PromptHashes, RoutePlanner
from router.served_model import ServedModel, ServedModels
from router.settings import RouterSettings
from router.tokenizer import Tokenizer
from router.tracing import end_request, trace_request
from servicekit.errors import ServingError
from servicekit.logging import get_logger
from servicekit.tracing import Tracer

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What every request needs; built once, in app.py."""

    settings: RouterSettings
    models: ServedModels
    quotas: QuotaGate
    metrics: RouterMetrics
    drain: Drain
    tracer: Tracer

    # Of the model that answers when none is named.

    @property
    def tokenizer(self) -> Tokenizer:
        return self.models.first.tokenizer

    @property
    def fleet(self) -> Fleet:
        return self.models.first.fleet

    @property
    def planner(self) -> RoutePlanner:
        return self.models.first.planner


class GenerationResponse(Response):
    """The whole exchange in one coroutine, so that one place sees it end, however that happens."""

    def __init__(self, serving: Serving, request: Request, endpoint: Endpoint) -> None:
        self._serving = serving
        self._request = request
        self._endpoint = endpoint
        self._accepted_at = time.monotonic()
        self._is_started = False
        self._caller = caller_of(request)
        self._grant = Grant({})
        self._format: AnswerFormat | None = None
        self._choices: list[Choice] = []
        self._in_flight: Gauge | None = None  # they count in it
        given = request.headers.get("x-request-id", "")
        self._has_id = _REQUEST_ID.fullmatch(given) is not None
        self._request_id = given if self._has_id else uuid.uuid4().hex
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
            parsed = parse_body(self._endpoint.body, body, rejects_unknown=settings.rejects_unknown_fields)
            model, generation = await self._read(self._endpoint.to_request(parsed))
            context = AnswerContext(
                generation=generation,
                tokenizer=model.tokenizer,
                request_id=self._request_id,
                model=model.name,
                reasoning_fields=settings.reasoning_fields,
            )
            demand = Demand.of(
                sum(len(prompt.token_ids) for prompt in generation.prompts),
                [sampling.max_tokens for sampling in generation.sampling],
            )
            async with self._serving.quotas.admit(self._caller, demand, self._num_used_tokens) as self._grant:
                self._choices = self._open_choices(model, generation)
                for choice in self._choices:
                    await choice.flow.submit()
                answer = self._format = self._endpoint.new_format(parsed, context)
                if generation.streams:
                    await self._stream(answer, send)
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

    async def _read(self, request: ChatRequest | CompletionRequest) -> tuple[ServedModel, Generation]:
        model = self._serving.models.named(request.model, self._caller)
        self._span.set({"gen_ai.request.model": model.name})
        if request.request_id is not None and not self._has_id:
            self._request_id = request.request_id
        return model, await model.read(request)

    def _open_choices(self, model: ServedModel, generation: Generation) -> list[Choice]:
        serving = self._serving
        settings = serving.settings
        deadline = request_deadline(self._request.headers, settings.request_timeout_s, self._accepted_at)
        limits = FlowLimits(
            max_retries=settings.max_retries,
            worker_timeout_s=settings.worker_timeout_s,
            overload=model.overload,
        )
        hashes = [
            PromptHashes(prompt.token_ids, generation.cache_salt, self._caller.tenant)
            for prompt in generation.prompts
        ]
        priority = self._caller.priority(generation.priority)
        metrics = serving.metrics.of(model.name)
        branches = [Branches() if generation.num_choices > 1 else None for _ in generation.prompts]
        markers = generation.output.markers if generation.output else ()
        choices = []
        for index, sampling in enumerate(generation.sampling):
            prompt_index = index // generation.num_choices
            flow_request = FlowRequest(
                request_id=self._request_id,
                prompt=hashes[prompt_index],
                sampling=sampling,
                accepted_at=self._accepted_at,
                deadline=deadline,
                priority=priority,
                may_be_refused=index == 0,
                branches=branches[prompt_index],
                span=self._span,
            )
            flow = RequestFlow(flow_request, model.fleet, model.planner, metrics, limits)
            detokenizer = model.tokenizer.detokenizer(
                skips_special_tokens=generation.skips_special_tokens, shown_tokens=markers
            )
            choices.append(Choice(index, prompt_index, flow, detokenizer, generation))
        self._in_flight = metrics.in_flight
        self._in_flight.inc(len(choices))
        return choices

    async def _stream(self, answer: AnswerFormat, send: Send) -> None:
        """The status waits for the first token: until then an error still gets its own."""
        async with aclosing(cast(Any, deltas(self._choices))) as stream:
            async for choice, delta in stream:
                opening = b"" if self._is_started else answer.opening(self._choices)
                chunk = opening + answer.chunk(choice, delta, self._choices)
                if not self._is_started:
                    await self._begin_stream(answer, chunk, send)
                elif chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        tail = answer.closing(self._choices)
        await self._grant.settle()
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def _begin_stream(self, answer: AnswerFormat, chunk: bytes, send: Send) -> None:
        await self._start(send, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")])
        if chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        writer = stream_writer(self._request.scope)
        if writer is not None:
            open_direct_streams(self._choices, answer, writer)

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
        if self._is_started and self._format is not None:
            tail = self._format.failure(error)
            await send({"type": "http.response.body", "body": tail, "more_body": False})
            return
        self._serving.metrics.refused(error)
        response = error_response(error, self._endpoint.error_body)
        response.headers["x-request-id"] = self._request_id
        await response(scope, receive, send)

    def _end(self, outcome: str) -> None:
        metrics = self._serving.metrics
        for choice in self._choices:
            choice.flow.close()
        if self._in_flight is not None:
            self._in_flight.dec(len(self._choices))
        end_request(self._span, self._choices, outcome)
        endpoint = self._endpoint.name
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
