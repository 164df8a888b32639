"""The life of one sequence as the router sees it. Nothing else submits, migrates or cancels.

1. A route is chosen; without a decode worker it waits for one, within limits.
2. Submitted: tokens come up the link and are kept.
3. A worker lost: the sequence is submitted elsewhere with the tokens it has and goes on at the next position;
   sampling is keyed by (seed, position), so the reader sees one sequence.
4. It finishes, or fails with a ServingError. close() cancels it in any state.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from proto import common_pb2, link_pb2
from router.api_types import pack_ids
from router.fleet import Fleet
from router.link import Link, LinkStream, Taker
from router.model_metrics import ModelMetrics
from router.overload import OverloadGuard, Patience
from router.route_planner import PromptHashes, Route, RoutePlanner, log_route
from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost
from servicekit.logging import get_logger
from servicekit.tracing import NO_SPAN, Span

log = get_logger(__name__)

_FINISH_REASONS = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowLimits:
    max_retries: int
    worker_timeout_s: float
    overload: OverloadGuard


@dataclass(slots=True)
class Branches:
    """Several answers to one prompt: they go to one worker, which computes the prompt once, and when that is
    lost to another one together."""

    group: int = field(default_factory=lambda: secrets.randbits(63) | 1)
    route: Route | None = None  # of the one that was submitted last


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRequest:
    request_id: str
    prompt: PromptHashes
    sampling: common_pb2.SamplingParams
    accepted_at: float  # time.monotonic(), as the deadline
    deadline: float | None = None
    priority: int = 0  # the smaller, the earlier
    may_be_refused: bool = True  # when all workers are too busy: not one of several sequences after the first
    branches: Branches | None = None  # this is one of them
    span: Span = NO_SPAN  # of the whole request; the workers' spans are its children


@dataclass(slots=True)
class FlowUpdate:
    token_ids: list[int] = field(default_factory=list)
    logprobs: Sequence[common_pb2.TokenLogprobs] = ()
    prompt_logprobs: Sequence[common_pb2.TokenLogprobs] = ()
    finish_reason: str | None = None  # "stop": token_ids ends with the token that stopped it; or "length"


class RequestFlow:
    def __init__(
        self,
        request: FlowRequest,
        fleet: Fleet,
        planner: RoutePlanner,
        metrics: ModelMetrics,
        limits: FlowLimits,
    ) -> None:
        self._request = request
        self._fleet = fleet
        self._planner = planner
        self._metrics = metrics
        self._limits = limits
        self.output_ids: list[int] = []
        self.first_route: Route | None = None
        self.timings: link_pb2.RequestTimings | None = None
        self._has_logprobs = request.sampling.HasField("num_logprobs")
        self._has_prompt_logprobs = request.sampling.HasField("num_prompt_logprobs")
        self._route: Route | None = None
        self._stream: LinkStream | None = None
        self._taker: Taker | None = None
        self._excluded: set[Link] = set()
        self._allows_prefill = True
        self._num_retries = 0
        self._first_token_at = 0.0
        self._last_token_at = 0.0
        self._expiry: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._routed_at = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt.token_ids)

    async def submit(self) -> None:
        """Choose workers and send the sequence to them. Overloaded when no decode worker shows up in time."""
        branches = self._request.branches
        route = await self._wait_for_route()
        if self.first_route is None and self._request.may_be_refused:
            route = self._limits.overload.admitted(route, self._patience(), self._replan)
        submission = self._submission(route)
        if branches is not None:
            submission.branch_group = branches.group
            branches.route = route
        self._stream = route.link.submit(submission)
        self._stream.taker = self._taker
        self._route = route
        self._routed_at = time.monotonic()
        route.begin()
        if self.first_route is None:
            self.first_route = route
            self._arm_deadline()
        self._tell_routed(route)

    async def next_update(self) -> FlowUpdate:
        """New tokens, or the end. Raises ServingError when the sequence cannot be completed."""
        while True:
            if self._stream is None:
                if len(self.output_ids) >= self._request.sampling.max_tokens:
                    return FlowUpdate(finish_reason="length")  # only its end was lost with the worker
                await self.submit()
            assert self._stream is not None
            try:
                update = self._absorb(await self._stream.next())
            except ServingError as error:
                self._prepare_retry(error)
                continue
            if update.token_ids or update.finish_reason:
                return update

    def offer_updates(self, taker: Taker) -> None:
        """From now on `taker` is offered what comes while next_update() waits (router/link.py): tokens in the
        middle of the sequence, to be read with take_tokens()."""
        self._taker = taker
        if self._stream is not None:
            self._stream.taker = taker

    def take_tokens(self, update: link_pb2.SequenceUpdate) -> FlowUpdate:
        """Of an update that is not the last one, or of several."""
        return self._tokens_of((update,))

    def close(self, finish_reason: str = "abort") -> None:
        """Idempotent; cancels what has not ended. `finish_reason`: as the client is told."""
        self._taker = None
        self._detach()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._first_token_at and not self._is_closed:
            self._metrics.sequence_ended(
                e2e_s=self._last_token_at - self._request.accepted_at,
                decode_s=self._last_token_at - self._first_token_at,
                num_tokens=len(self.output_ids),
                reason=finish_reason,
            )
            if finish_reason != "abort":
                self._note_service_time()
        self._is_closed = True

    def _stamp_tokens(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self._first_token_at:
            self._metrics.gap(now - self._last_token_at, num_tokens)
        else:
            self._first_token_at = now
            self._request.span.event("first_token")
            self._metrics.first_token(
                ttft_s=now - self._request.accepted_at,
                num_prompt_tokens=self.num_prompt_tokens,
                num_hit_tokens=self.timings.num_hit_tokens if self.timings else 0,
            )
            if self.timings is not None and self._route is not None:
                decision = self._route.decision
                self._metrics.activity.took_route(decision.decode_id, self.timings, self.num_prompt_tokens)
                self._metrics.predicted(decision, self.timings, ttft_s=now - self._routed_at)
        self._last_token_at = now

    def _note_service_time(self) -> None:
        decode_s = self._last_token_at - self._first_token_at
        is_local = self.timings is not None and not self.timings.prefill_worker_id
        prefill_s = self.timings.prefill_s if self.timings is not None and is_local else 0.0
        self._limits.overload.times.ended(prefill_s + decode_s, decode_s, len(self.output_ids))

    def _patience(self) -> Patience:
        request = self._request
        return Patience(
            time_left_s=None if request.deadline is None else request.deadline - time.monotonic(),
            max_tokens=request.sampling.max_tokens,
            priority=request.priority,
        )

    def _replan(self, excluded: set[Link]) -> Route | None:
        return self._planner.plan(self._request.prompt, self._request.sampling.max_tokens, excluded=excluded)

    def _tell_routed(self, route: Route) -> None:
        decision = route.decision
        self._metrics.routed(decision)
        log_route(self._request.request_id, self.num_prompt_tokens, decision)
        route.decision = replace(decision, options=())  # as many as workers: not for the life of a request
        self._request.span.event(
            "routed",
            {
                "baton.decode_worker": decision.decode_id,
                "baton.prefill_worker": decision.prefill_id or "",
                "baton.peer": decision.peer_id or "",
                "baton.predicted_hit_tokens": decision.num_hit_tokens,
            },
        )
        log.info(
            "request_routed",
            request_id=self._request.request_id,
            decode=decision.decode_id,
            prefill=decision.prefill_id or "local",
            peer=decision.peer_id or "",
            predicted_hit_tokens=decision.num_hit_tokens,
            num_prompt_tokens=self.num_prompt_tokens,
        )

    def _branch_route(self) -> Route | None:
        """Where another branch went, if that is still there and this one was not turned away there."""
        route = self._request.branches.route if self._request.branches else None
        if route is None or not route.link.is_up or route.link in self._excluded:
            return None
        if route.prefill is not None and not self._allows_prefill:
            return None
        return route.for_branch()

    async def _wait_for_route(self) -> Route:
        give_up_at = time.monotonic() + self._limits.worker_timeout_s
        if self._request.deadline is not None:
            give_up_at = min(give_up_at, self._request.deadline)
        prompt = self._request.prompt
        if self.output_ids:
            token_ids = pack_ids([*prompt.token_ids, *self.output_ids])
            prompt = PromptHashes(token_ids, prompt.cache_salt, prompt.tenant)
        while True:
            route = self._branch_route() or self._plan(prompt)
            if route is not None:
                return route
            if not await self._fleet.wait_for_change(give_up_at - time.monotonic()):
                raise Overloaded("no decode worker is available")

    def _plan(self, prompt: PromptHashes) -> Route | None:
        max_tokens = self._request.sampling.max_tokens - len(self.output_ids)
        return self._planner.plan(
            prompt, max_tokens, excluded=self._excluded, allows_prefill=self._allows_prefill
        )

    def _submission(self, route: Route) -> link_pb2.Submit:
        request = self._request
        sequence = common_pb2.SequenceSpec(
            request_id=request.request_id,
            prompt_ids=request.prompt.token_ids,
            output_ids=self.output_ids,
            sampling=request.sampling,
            cache_salt=request.prompt.cache_salt,
            tenant=request.prompt.tenant,
            priority=request.priority,
            time_left_s=self._time_left_s(),
            traceparent=request.span.traceparent,
        )
        if self.timings is not None:
            sequence.sampling.ClearField("num_prompt_logprobs")  # they were delivered
        submit = link_pb2.Submit(sequence=sequence)
        if route.prefill is not None:
            submit.prefill_worker_id = route.prefill.worker_id
            submit.prefill_address = route.prefill.address
        if route.peer is not None:
            peer = route.peer.record
            submit.peer.worker_id, submit.peer.address = peer.worker_id, peer.address
            submit.peer.num_blocks = route.peer.num_blocks
        return submit

    def _time_left_s(self) -> float:
        if self._request.deadline is None:
            return 0.0
        left_s = self._request.deadline - time.monotonic()
        if left_s <= 0:
            raise self._expired()
        return left_s

    def _absorb(self, updates: list[link_pb2.SequenceUpdate]) -> FlowUpdate:
        """One update out of all that came. What failed is prepared for another try, or raised."""
        merged = self._tokens_of(updates)
        last = updates[-1]
        if last.HasField("error"):
            self._prepare_retry(_error_from_pb(last.error))
        elif last.finish_reason == common_pb2.FINISH_REASON_ABORTED:
            self._prepare_retry(WorkerLost("the worker aborted the sequence"))
        elif last.finish_reason:
            merged.finish_reason = _FINISH_REASONS[last.finish_reason]
        return merged

    def _tokens_of(self, updates: Sequence[link_pb2.SequenceUpdate]) -> FlowUpdate:
        """Kept and counted."""
        token_ids = updates[0].token_ids[:]  # a list: three times as fast as the field
        for update in updates[1:]:
            token_ids += update.token_ids[:]
        tokens = FlowUpdate(token_ids)
        if self.timings is None:
            timings = next((update.timings for update in updates if update.HasField("timings")), None)
            if timings is not None:
                self._note_timings(timings)
        if self._has_logprobs:
            tokens.logprobs = [token for update in updates for token in update.logprobs]
        if self._has_prompt_logprobs:
            tokens.prompt_logprobs = next((u.prompt_logprobs for u in updates if u.prompt_logprobs), ())
        if token_ids and self._route is not None:
            self._route.prefill_ended()
            self.output_ids += token_ids
            self._stamp_tokens(len(token_ids))
        return tokens

    def _note_timings(self, timings: link_pb2.RequestTimings) -> None:
        self.timings = timings
        route = self._route
        if timings.prefill_fell_back and route is not None and route.prefill is not None:
            self._fleet.suspect(route.prefill.worker_id)

    def _prepare_retry(self, error: ServingError) -> None:
        """Leave the worker and note what to avoid; raises `error` when there is no point in another try."""
        route = self._route
        self._detach()
        deadline = self._request.deadline
        if deadline is not None and time.monotonic() >= deadline:
            raise self._expired() from error
        if route is None or self._num_retries >= self._limits.max_retries:
            raise error
        if isinstance(error, HandoffFailed):
            self._allows_prefill = False
            if route.prefill is not None:
                self._fleet.suspect(route.prefill.worker_id)
        elif isinstance(error, Overloaded):
            self._excluded.add(route.link)
            if self._plan(self._request.prompt) is None:
                raise error
        elif not isinstance(error, WorkerLost):
            raise error
        elif route.link.is_up:  # the worker itself said so, for example because it drains
            self._excluded.add(route.link)
        self._num_retries += 1
        self._metrics.migrated()
        self._request.span.event(
            "migrated", {"baton.left": route.decision.decode_id, "error.type": type(error).__name__}
        )
        log.warning(
            "request_migrated",
            request_id=self._request.request_id,
            left=route.decision.decode_id,
            num_output_tokens=len(self.output_ids),
            reason=str(error),
        )

    def _detach(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._route is not None:
            self._route.prefill_ended()
            self._route = None

    def _arm_deadline(self) -> None:
        if self._request.deadline is not None:
            left_s = self._request.deadline - time.monotonic()
            self._expiry = asyncio.get_running_loop().call_later(left_s, self._expire)

    def _expire(self) -> None:
        if self._stream is not None:
            self._stream.fail(self._expired())

    def _expired(self) -> Overloaded:
        return Overloaded("the request took longer than this server allows")


def _error_from_pb(error: common_pb2.Error) -> ServingError:
    if error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST:
        return InvalidRequest(error.message)
    if error.kind == common_pb2.ERROR_KIND_OVERLOADED:
        return Overloaded(error.message, retry_after_s=error.retry_after_s or 1.0)
    if error.kind == common_pb2.ERROR_KIND_WORKER_LOST:
        return WorkerLost(error.message)
    if error.kind == common_pb2.ERROR_KIND_HANDOFF_FAILED:
        return HandoffFailed(error.message, state="TRANSFERRING")
    return ServingError(error.message)
