"""One Prefill call as two spans, one after the other: queue, and prefill with an event a chunk of KV."""

from __future__ import annotations

from types import TracebackType

from proto.common_pb2 import SequenceSpec
from servicekit.tracing import Tracer


class PrefillTrace:
    """`with PrefillTrace(...) as trace`: whatever ends the block is recorded on the span that is open."""

    def __init__(self, tracer: Tracer, spec_pb: SequenceSpec) -> None:
        self._tracer = tracer
        self._parent = spec_pb.traceparent
        self._span = tracer.start("queue", self._parent, {"baton.request_id": spec_pb.request_id})

    def started(self, num_blocks: int, num_hit_tokens: int) -> None:
        self._span.end()
        attributes = {"baton.num_blocks": num_blocks, "baton.num_hit_tokens": num_hit_tokens}
        self._span = self._tracer.start("prefill", self._parent, attributes)

    def chunk(self, num_layers: int, num_blocks: int, num_bytes: int) -> None:
        """Of KV, on its way to the decode worker."""
        attributes = {"baton.num_layers": num_layers, "baton.num_blocks": num_blocks}
        self._span.event("chunk", {**attributes, "baton.num_bytes": num_bytes})

    def finished(self, num_prompt_tokens: int, num_bytes: int) -> None:
        """The first token is sampled; the wait for the receiver's commit is no longer prefill."""
        self._span.set({"baton.num_prompt_tokens": num_prompt_tokens, "baton.transfer_bytes": num_bytes})
        self._span.end()

    def __enter__(self) -> PrefillTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._span.fail(error)
        self._span.end()
