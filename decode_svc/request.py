"""The owner of one request on a decode worker: hand-off or local prefill, decode, and giving everything back.

Tokens do not pass through the owner's coroutine: the engine's outputs go straight to the link, the coroutine
waits for the last one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from collections.abc import Sequence as PbSequence
from contextlib import contextmanager
from dataclasses import dataclass

from decode_svc.branches import BranchTurn
from decode_svc.handoff import FirstToken, Handoff
from decode_svc.link_updates import LinkUpdates
from decode_svc.metrics import DecodeMetrics
from decode_svc.request_trace import RequestTrace
from engine.kv_load import KvSource
from engine.outputs import FinishReason, SequenceOutput
from engine.sequence import Sequence
from proto import common_pb2
from proto.link_pb2 import RequestTimings, SequenceUpdate, Submit
from servicekit.errors import InvalidRequest, ServingError
from servicekit.logging import get_logger
from worker.admission import Admission
from worker.async_engine import AsyncEngine
from worker.cancellation import check_cancelled
from worker.conversions import all_logprobs_to_pb, error_to_pb, finish_reason_to_pb, logprobs_to_pb
from worker.deadline import Deadline
from worker.peer_fetcher import PeerFetcher
from worker.sequence_spec import add_sequence, decode_sequence
from worker.transfers import TransferEnvironment

log = get_logger(__name__)

_REASON_NAMES = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnvironment:
    """What all requests of one decode worker share."""

    transfers: TransferEnvironment
    fetcher: PeerFetcher
    admission: Admission
    metrics: DecodeMetrics

    @property
    def engine(self) -> AsyncEngine:
        return self.transfers.engine


class DecodeRequest:
    def __init__(
        self,
        environment: RequestEnvironment,
        submit_pb: Submit,
        updates: LinkUpdates,
        turn: BranchTurn,
    ) -> None:
        """`turn` of a group of one waits for nobody."""
        self._environment = environment
        self._engine = environment.engine
        self._metrics = environment.metrics
        self._key = submit_pb.key
        self._submit_pb = submit_pb
        self._spec_pb = submit_pb.sequence
        self._updates = updates
        self._turn = turn
        self._has_ended = False  # the final update is on its way
        self._over = asyncio.Event()  # and the engine does nothing more for it
        self._failure: BaseException | None = None  # why the engine has ended it or did not take it
        self._prompt_logprobs_pb: PbSequence[
            common_pb2.TokenLogprobs
        ] = ()  # of another branch of this prompt
        self._num_tokens = 0
        self._accepted_at = time.monotonic()
        self._first_token_at = 0.0
        self._finish_reason = "abort"
        self._prefill_fell_back = False
        self._trace = RequestTrace(environment.transfers.tracer, self._spec_pb)

    @property
    def branch_group(self) -> int:
        return self._submit_pb.branch_group

    async def run(self) -> None:
        """Ends with exactly one final update. Raises only CancelledError."""
        outcome = "cancelled"
        failure: BaseException | None = None
        try:
            with self._environment.admission.admit():
                deadline = Deadline(self._spec_pb.time_left_s)
                async with deadline.enforced():
                    await self._run(deadline)
            outcome = "finished"
        except asyncio.CancelledError as error:
            failure = error
            self._end(SequenceUpdate(key=self._key, finish_reason=common_pb2.FINISH_REASON_ABORTED))
            raise
        except ServingError as error:
            outcome, failure = type(error).__name__, error
            self._end(SequenceUpdate(key=self._key, error=error_to_pb(error)))
        except Exception as error:
            outcome, failure = "ServingError", error
            log.exception("request_failed", request_id=self._spec_pb.request_id)
            internal = ServingError(f"decode failed: {type(error).__name__}")
            self._end(SequenceUpdate(key=self._key, error=error_to_pb(internal)))
        finally:
            self._turn.end()
            self._tell_ended(outcome, failure)

    def cancelled_before_run(self) -> None:
        """The task was cancelled before `run` began."""
        self._end(SequenceUpdate(key=self._key, finish_reason=common_pb2.FINISH_REASON_ABORTED))
        self._trace.end("cancelled", 0, asyncio.CancelledError())

    async def _run(self, deadline: Deadline) -> None:
        await self._turn.wait()
        self._prompt_logprobs_pb = self._turn.take_prompt_logprobs(self._spec_pb.sampling)
        if self._is_handed_off and await self._run_handed_off(deadline):
            return
        with self._environment.fetcher.offered(self._submit_pb, deadline) as source:
            await self._run_locally(source)

    @property
    def _is_handed_off(self) -> bool:
        """Not where no more is to be computed than the last block of a prompt that is here already."""
        is_nearly_computed = self._turn.finds_prompt_cached and not self._spec_pb.output_ids
        return bool(self._submit_pb.prefill_address) and not is_nearly_computed

    async def _run_locally(self, source: KvSource | None) -> None:
        seq = await decode_sequence(self._engine, self._spec_pb, source)
        with self._owned(seq):
            self._engine.send(lambda engine: add_sequence(engine, seq), self._refused)
            await self._until_over()

    async def _run_handed_off(self, deadline: Deadline) -> bool:
        """False when the prefill worker failed, with nothing left of the attempt."""
        seq = await decode_sequence(self._engine, self._spec_pb)
        handoff = Handoff(self._environment.transfers, seq, self._submit_pb, deadline)
        with self._owned(seq):
            try:
                await handoff.run(self._on_commit)
            except InvalidRequest:
                raise
            except ServingError as error:
                check_cancelled()
                log.warning(
                    "prefill_fell_back",
                    request_id=self._spec_pb.request_id,
                    prefill_address=self._submit_pb.prefill_address,
                    reason=str(error),
                )
                self._metrics.count_fallback(error)
                self._trace.fell_back(error)
                self._prefill_fell_back = True
                return False
            finally:
                self._metrics.observe_handoff(handoff)
            await self._until_over()
        return True

    def _refused(self, error: BaseException) -> None:
        """By the engine, which has not taken the sequence."""
        self._failure = error
        self._over.set()

    async def _until_over(self) -> None:
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _owned(self, seq: Sequence) -> Iterator[None]:
        self._engine.attach(seq.seq_id, self._on_output)
        try:
            yield
        finally:
            self._engine.detach(seq.seq_id)
            if not self._has_ended:
                self._engine.post(lambda engine: engine.abort(seq.seq_id))

    def _on_commit(self, first: FirstToken, ended: SequenceOutput | None) -> None:
        reason = ended.finish_reason if ended is not None else None
        if ended is None and first.is_last:
            reason = self._reason_after(first.logprobs.token_id)
        wants_logprobs = self._spec_pb.sampling.HasField("num_logprobs")
        self._tell_first_token(first.timings_pb, is_last=reason is not None)
        prompt_logprobs_pb = first.prompt_logprobs_pb or self._prompt_logprobs_pb
        self._turn.computed(self._spec_pb.sampling, prompt_logprobs_pb, is_cached=not first.is_last)
        self._update(
            SequenceUpdate(
                key=self._key,
                token_ids=[first.logprobs.token_id],
                logprobs=[logprobs_to_pb(first.logprobs)] if wants_logprobs else None,
                finish_reason=finish_reason_to_pb(reason),
                timings=first.timings_pb,
                prompt_logprobs=prompt_logprobs_pb,
            )
        )

    def _on_output(self, output: SequenceOutput) -> None:
        if self._num_tokens and output.finish_reason is None and not output.logprobs:
            self._num_tokens += len(output.token_ids)
            self._updates.add_tokens(self._key, output.token_ids)
        else:
            self._on_other_output(output)

    def _on_other_output(self, output: SequenceOutput) -> None:
        """The first and the last token, and those that come with more."""
        if output.error is not None:
            self._failure = failure = InvalidRequest(output.error)
            self._end(SequenceUpdate(key=self._key, error=error_to_pb(failure)))
            return
        update_pb = SequenceUpdate(
            key=self._key,
            token_ids=output.token_ids,
            logprobs=all_logprobs_to_pb(output.logprobs),
            finish_reason=finish_reason_to_pb(output.finish_reason),
        )
        if not self._num_tokens and output.token_ids:
            timings_pb = RequestTimings(
                num_hit_tokens=output.num_hit_tokens,
                queue_s=output.queue_s,
                prefill_s=output.prefill_s,
                prefill_fell_back=self._prefill_fell_back,
                num_loaded_tokens=output.num_loaded_tokens,
                num_fetched_tokens=output.num_fetched_tokens,
                load_s=output.load_s,
            )
            update_pb.timings.CopyFrom(timings_pb)
            prompt_logprobs_pb = all_logprobs_to_pb(output.prompt_logprobs) or self._prompt_logprobs_pb
            update_pb.prompt_logprobs.extend(prompt_logprobs_pb)
            self._tell_first_token(timings_pb, is_last=output.finish_reason is not None)
            self._turn.computed(self._spec_pb.sampling, prompt_logprobs_pb, is_cached=True)
        self._update(update_pb)

    def _update(self, update_pb: SequenceUpdate) -> None:
        if self._has_ended:
            return
        self._num_tokens += len(update_pb.token_ids)
        if update_pb.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self._finish_reason = _REASON_NAMES.get(update_pb.finish_reason, "abort")
            self._trace.last_token(self._num_tokens)
            self._has_ended = True
            self._over.set()
        self._updates.add(update_pb)

    def _tell_first_token(self, timings_pb: RequestTimings, *, is_last: bool) -> None:
        self._first_token_at = time.monotonic()
        self._metrics.observe_first_token(timings_pb, ttft_s=self._first_token_at - self._accepted_at)
        self._trace.first_token(timings_pb, is_last=is_last)

    def _tell_ended(self, outcome: str, failure: BaseException | None) -> None:
        now = time.monotonic()
        self._metrics.count_request(outcome, len(self._spec_pb.prompt_ids))
        if outcome == "finished":
            self._metrics.observe_finished(
                e2e_s=now - self._accepted_at,
                decode_s=now - self._first_token_at,
                num_tokens=self._num_tokens,
                reason=self._finish_reason,
            )
        self._trace.end(outcome, self._num_tokens, failure)
        log.info(
            "sequence_ended",
            request_id=self._spec_pb.request_id,
            outcome=outcome,
            num_tokens=self._num_tokens,
            elapsed_s=now - self._accepted_at,
        )

    def _end(self, update_pb: SequenceUpdate) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._over.set()
            self._updates.add(update_pb)

    def _reason_after(self, token_id: int) -> FinishReason:
        sampling_pb = self._spec_pb.sampling
        # A grammar lets the end be drawn only where nothing else can follow.
        is_ignored = sampling_pb.ignore_eos and not sampling_pb.HasField("grammar")
        eos_token_ids = frozenset() if is_ignored else self._engine.engine.eos_token_ids
        is_stop = token_id in eos_token_ids or token_id in sampling_pb.stop_token_ids
        return FinishReason.STOP if is_stop else FinishReason.LENGTH
