"""Workers without processes: real engines on a model of a few lines, each telling a real Redis what it has.

One thread runs everything, so a run is the same every time but for what Redis and the event loop do in
between. The next token of the fake model depends on all KV of a sequence: a block with wrong contents
changes an answer.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.kv_cache import KvCache
from engine.outputs import SequenceOutput, StepOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kvstore.redis_index import RedisIndex
from kvstore.store import Store

OnDone = Callable[["Request"], None]  # not for cancelled and lost requests


class RequestState(enum.Enum):
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()
    LOST = enum.auto()  # its worker was restarted


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    max_tokens: int
    tenant: str = ""


@dataclass(slots=True, eq=False)
class Request:
    request_id: int
    prompt: Prompt
    decode: Worker
    prefill: Worker | None  # None: no hand-off
    on_done: OnDone
    output_ids: list[int] = field(default_factory=list)
    num_hit_tokens: int = 0
    state: RequestState = RequestState.RUNNING

    def make_sequence(self, **fields: object) -> Sequence:
        prompt = self.prompt
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=prompt.max_tokens)
        return Sequence(
            self.request_id,
            list(prompt.token_ids),
            sampling,
            tenant=prompt.tenant,
            **fields,  # type: ignore[arg-type]
        )


class _Carrier:
    """The KV listener of a hand-off: copies what the prefill worker computes to where decode wants it."""

    def __init__(self, request: Request, block_ids: list[int], num_held_blocks: int) -> None:
        self._request = request
        self._block_ids = block_ids
        self._num_held = num_held_blocks

    def started(self, num_blocks: int, num_hit_tokens: int, queue_s: float, origin: KvCache) -> None:
        self._request.num_hit_tokens = num_hit_tokens

    def kv_ready(self, first_layer: int, num_layers: int, first_block: int, block_ids: list[int]) -> None:
        request = self._request
        skipped = max(0, self._num_held - first_block)
        wanted = block_ids[skipped:]
        if not wanted or request.state is not RequestState.RUNNING:
            return
        assert request.prefill is not None
        start = first_block + skipped
        payload = request.prefill.engine.kv_cache.read_blocks(first_layer, num_layers, wanted)
        targets = self._block_ids[start : start + len(wanted)]
        request.decode.engine.kv_cache.write_blocks(first_layer, num_layers, targets, payload)


class Worker:
    """One incarnation of a worker. Owns its engine and its entry in the index until stop() or crash()."""

    def __init__(self, worker_id: str, incarnation: str, engine: Engine, store: Store, model: str) -> None:
        self.worker_id = worker_id
        self.engine = engine
        self.index = RedisIndex(store, model, worker_id, incarnation)
        self.requests: dict[int, Request] = {}
        self.index.start()

    def publish(self, step: StepOutput) -> None:
        events = step.block_events
        self.index.evict(events.removed)
        for block_hash, tier in events.placed:
            self.index.publish([block_hash], tier)

    async def stop(self) -> None:
        self._close()
        await self.index.stop()

    def crash(self) -> None:
        """Redis hears nothing: the next incarnation must put things right."""
        self._close()
        if self.index.task is not None:
            self.index.task.cancel()

    def _close(self) -> None:
        self.engine.abort_all()
        self.engine.check_integrity()


class Fleet:
    """Submits, steps, cancels, restarts. Not thread-safe."""

    def __init__(
        self, store: Store, model: str, num_workers: int, build_engine: Callable[[], Engine]
    ) -> None:
        self._store = store
        self._model = model
        self._build_engine = build_engine
        self._incarnations = itertools.count()
        self._request_ids = itertools.count()
        self.workers = {name: self._start(name) for name in (f"worker-{i}" for i in range(num_workers))}
        self.num_steps = 0
        self.num_handoffs = 0
        self._num_commits = 0

    def requests(self) -> list[Request]:
        """Those that run."""
        return [r for worker in self.workers.values() for r in worker.requests.values() if r.decode is worker]

    def submit(self, prompt: Prompt, decode_id: str, prefill_id: str | None, on_done: OnDone) -> None:
        """A hand-off when another worker is to prefill."""
        decode = self.workers[decode_id]
        prefill = None if prefill_id is None or prefill_id == decode_id else self.workers[prefill_id]
        request = Request(next(self._request_ids), prompt, decode, prefill, on_done)
        decode.requests[request.request_id] = request
        if prefill is None:
            decode.engine.add(request.make_sequence())
            return
        self.num_handoffs += 1
        prefill.requests[request.request_id] = request
        num_held = decode.engine.reserve(request.make_sequence())

        def on_ready(block_ids: list[int]) -> None:
            carrier = _Carrier(request, block_ids, num_held)
            prefill.engine.add(request.make_sequence(keeps_blocks=True, kv_listener=carrier))

        decode.engine.extend(request.request_id, on_ready)

    def cancel(self, request: Request, state: RequestState = RequestState.CANCELLED) -> None:
        request.state = state
        for worker in (request.decode, request.prefill):
            if worker is not None and worker.requests.pop(request.request_id, None):
                worker.engine.abort(request.request_id)

    def step(self, *, idle_ones_too: bool = False) -> None:
        """Each worker with work makes one step."""
        for worker in self.workers.values():
            if worker.engine.has_work or idle_ones_too:
                step = worker.engine.step()
                self.num_steps += 1
                worker.publish(step)
                for output in step.outputs:
                    self._take(worker, output)

    def settle(self) -> None:
        """Step until the events of every worker tell all that it has: the block events of a commit or an
        allocation come with the worker's next step."""
        num_before = -1
        while num_before != self._num_commits:
            num_before = self._num_commits
            self.step(idle_ones_too=True)

    async def restart(self, worker_id: str, *, crashes: bool) -> None:
        old = self.workers[worker_id]
        for request in list(old.requests.values()):
            self.cancel(request, RequestState.LOST)
        if crashes:
            old.crash()
        else:
            await old.stop()
        self.workers[worker_id] = self._start(worker_id)

    async def stop(self) -> None:
        for worker in self.workers.values():
            await worker.stop()

    def _start(self, worker_id: str) -> Worker:
        incarnation = f"i{next(self._incarnations)}"
        return Worker(worker_id, incarnation, self._build_engine(), self._store, self._model)

    def _take(self, worker: Worker, output: SequenceOutput) -> None:
        request = worker.requests[output.seq_id]
        if worker is request.prefill:
            self._commit(request, output)
            return
        if not request.output_ids:
            request.num_hit_tokens = max(request.num_hit_tokens, output.num_hit_tokens)
        request.output_ids += output.token_ids
        if output.finish_reason is not None:
            self._finish(request)

    def _commit(self, request: Request, output: SequenceOutput) -> None:
        assert request.prefill is not None
        self._num_commits += 1
        [token_id] = output.token_ids
        request.output_ids.append(token_id)
        last = request.decode.engine.commit(request.request_id, TokenLogprobs(token_id, 0.0))
        request.prefill.engine.release(request.request_id)
        del request.prefill.requests[request.request_id]
        if last is not None:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        request.state = RequestState.DONE
        del request.decode.requests[request.request_id]
        request.on_done(request)


def check_blocks(fleet: Fleet) -> None:
    """AssertionError when blocks of a worker do not add up, or somebody else's are in use."""
    for worker in fleet.workers.values():
        worker.engine.check_integrity()
        load = worker.engine.load()
        assert load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks == load.num_total_blocks
        if not worker.requests:
            assert load.num_used_blocks == 0, f"{worker.worker_id}: blocks of nobody are in use"
