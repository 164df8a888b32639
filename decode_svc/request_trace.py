"""Where the time of one request goes on a decode worker, as spans.

sequence                 on this worker, from submission to the end; child of the router's request
  queue, prefill         by the prefill worker, or by this one when the prompt is computed here
  transfer               started -> committed, by decode_svc/handoff.py
  decode                 first token -> last
"""

from __future__ import annotations

from proto.common_pb2 import SequenceSpec
from proto.link_pb2 import RequestTimings
from servicekit.tracing import Span, Tracer


class RequestTrace:
    def __init__(self, tracer: Tracer, spec_pb: SequenceSpec) -> None:
        """Takes the parent from `spec_pb` and puts its own context there, for the spans below it."""
        self._tracer = tracer
        self._decode: Span | None = None
        self._sequence = tracer.start(
            "sequence",
            spec_pb.traceparent,
            {
                "baton.request_id": spec_pb.request_id,
                "baton.num_prompt_tokens": len(spec_pb.prompt_ids),
                "baton.num_resumed_tokens": len(spec_pb.output_ids),
            },
        )
        spec_pb.traceparent = self._sequence.traceparent

    def fell_back(self, error: Exception) -> None:
        """The hand-off failed; the prompt will be computed here."""
        self._sequence.event("prefill_fell_back", {"error.type": type(error).__name__})

    def first_token(self, timings_pb: RequestTimings, *, is_last: bool) -> None:
        parent = self._sequence.traceparent
        if not timings_pb.prefill_worker_id:
            prefill_s = timings_pb.prefill_s
            self._tracer.record("queue", parent, {}, duration_s=timings_pb.queue_s, ended_s_ago=prefill_s)
            attributes = {"baton.num_hit_tokens": timings_pb.num_hit_tokens}
            self._tracer.record("prefill", parent, attributes, duration_s=prefill_s, ended_s_ago=0.0)
        if not is_last:
            self._decode = self._tracer.start("decode", parent)

    def last_token(self, num_tokens: int) -> None:
        """Before it is sent: what the router does with it is no longer decoding."""
        if self._decode is not None:
            self._decode.set({"baton.outcome": "finished", "baton.num_output_tokens": num_tokens})
            self._decode.end()
            self._decode = None

    def end(self, outcome: str, num_tokens: int, error: BaseException | None) -> None:
        """`outcome`: as in the metrics. `num_tokens`: generated here or brought by the hand-off."""
        attributes: dict[str, str | int] = {"baton.outcome": outcome, "baton.num_output_tokens": num_tokens}
        for span in (self._decode, self._sequence):
            if span is not None:
                span.set(attributes)
                if error is not None:
                    span.fail(error)
                span.end()
