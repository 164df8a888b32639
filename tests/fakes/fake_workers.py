"""Prefill and decode workers in this process: real services, gRPC and Engine, on FakeModel."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from decode_svc.link_service import LINK_METHOD, LINK_SERVICE, LinkService
from decode_svc.metrics import DecodeMetrics
from decode_svc.request import RequestEnvironment
from engine.engine import Engine
from engine.forward_batch import ForwardBatch
from engine.grammar.compiler import GrammarCompiler
from engine.kv_cache import KvCache
from prefill_svc.metrics import PrefillMetrics
from prefill_svc.prefill_service import PrefillService
from proto.common_pb2 import KvPeer, SamplingParams, SequenceSpec
from proto.link_pb2 import Cancel, LinkRequest, LinkResponse, SequenceUpdate, Submit
from servicekit.rpc import build_channel, build_server
from servicekit.tracing import NO_TRACER, Tracer
from tests.fakes.fake_model import FakeModel
from worker.admission import Admission
from worker.async_engine import AsyncEngine
from worker.fetch_limit import FetchLimit
from worker.fetch_metrics import FetchMetrics
from worker.kv_service import KvService
from worker.load import LoadMeter
from worker.peer_fetcher import PeerFetcher
from worker.transfers import TransferEnvironment

_GATE_S = 30.0  # no test holds a gate longer


class GatedModel(FakeModel):
    """Stops at the beginning of a forward pass, once held, until opened."""

    def __init__(self) -> None:
        super().__init__()
        self._is_held = threading.Event()
        self._is_open = threading.Event()
        self._is_open.set()
        self._num_passes_before = 0

    def hold(self, num_passes_before: int = 0) -> None:
        self._num_passes_before = num_passes_before
        self._is_open.clear()

    async def until_held(self) -> None:
        assert await asyncio.to_thread(self._is_held.wait, _GATE_S)

    def open(self) -> None:
        self._is_open.set()

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        layer_done: Callable[[int], None] | None = None,
        **wanted: Any,
    ) -> Any:
        if not self._is_open.is_set():
            if self._num_passes_before == 0:
                self._is_held.set()
                assert self._is_open.wait(_GATE_S), "a test left the gate closed"
                self._is_held.clear()
            self._num_passes_before -= 1
        return super().forward(batch, kv_cache, layer_done, **wanted)


@dataclass
class WorkerFacts:
    """Of a fake worker, beside its engine."""

    worker_id: str
    host_id: str
    accepts_shared_memory: bool = False
    accepts_device_memory: bool = False
    max_requests: int = 64
    port: int = 0
    fetch_progress_s: float = 5.0
    fetch_stall_s: float = 20.0
    fetch_limit: FetchLimit | None = None
    tracer: Tracer = NO_TRACER
    grammars: GrammarCompiler | None = None


@dataclass
class FakeWorker:
    engine: AsyncEngine
    admission: Admission
    metrics: CollectorRegistry
    load: LoadMeter
    transfers: TransferEnvironment
    fetcher: PeerFetcher
    kv_service: KvService
    worker_id: str
    address: str = ""
    server: grpc.aio.Server | None = None

    def as_peer(self, num_blocks: int) -> KvPeer:
        return KvPeer(worker_id=self.worker_id, address=self.address, num_blocks=num_blocks)

    async def used_blocks(self) -> int:
        """Blocks owned by sequences or reservations, after checking that the books are in order."""

        def count(engine: Engine) -> int:
            engine.check_integrity()
            return engine.load().num_used_blocks

        return await self.engine.call(count)

    async def until_idle(self) -> None:
        """Until every request is gone; then none may have left a block behind."""
        await self.admission.until_empty()
        assert await self.used_blocks() == 0

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def prefill_worker(
    engine: Engine, *, worker_id: str = "prefill-a", host_id: str = "this", **facts: Any
) -> AsyncIterator[FakeWorker]:
    def build(worker: FakeWorker) -> PrefillService:
        metrics = PrefillMetrics(worker.metrics)
        return PrefillService(
            worker.transfers, worker.fetcher, worker.admission, metrics, worker_id=worker_id
        )

    async with _worker(engine, build, WorkerFacts(worker_id, host_id, **facts)) as worker:
        yield worker


@asynccontextmanager
async def decode_worker(
    engine: Engine, *, worker_id: str = "decode-a", host_id: str = "that", **facts: Any
) -> AsyncIterator[FakeWorker]:
    def build(worker: FakeWorker) -> LinkService:
        environment = RequestEnvironment(
            transfers=worker.transfers,
            fetcher=worker.fetcher,
            admission=worker.admission,
            metrics=DecodeMetrics(worker.metrics),
        )
        return LinkService(environment, worker.load)

    async with _worker(engine, build, WorkerFacts(worker_id, host_id, **facts)) as worker:
        yield worker


@asynccontextmanager
async def _worker(
    engine: Engine, build: Callable[[FakeWorker], Any], facts: WorkerFacts
) -> AsyncIterator[FakeWorker]:
    worker = _parts(engine, facts)
    handlers = [build(worker).handler(), worker.kv_service.handler()]
    server, port = build_server(handlers, host="127.0.0.1", port=facts.port)
    worker.server = server
    worker.address = f"127.0.0.1:{port}"
    worker.engine.start()
    await server.start()
    try:
        yield worker
    finally:
        await server.stop(0)
        await worker.fetcher.close()
        await worker.transfers.close()
        assert await worker.engine.stop(10.0)
        engine.kv_cache.close()


def _parts(engine: Engine, facts: WorkerFacts) -> FakeWorker:
    async_engine = AsyncEngine(engine, facts.grammars)
    admission = Admission(facts.max_requests)
    metrics = CollectorRegistry()
    load = LoadMeter(admission, engine.num_blocks)
    async_engine.subscribe(load.observe)
    async_engine.subscribe_load(load.observe_load)
    transfers = TransferEnvironment.build(
        async_engine,
        facts.host_id,
        accepts_shared_memory=facts.accepts_shared_memory,
        accepts_device_memory=facts.accepts_device_memory,
        tracer=facts.tracer,
    )
    fetch_metrics = FetchMetrics(metrics)
    worker_id = facts.worker_id
    fetcher = PeerFetcher(transfers, fetch_metrics, worker_id=worker_id, progress_s=facts.fetch_progress_s)
    kv_service = KvService(
        transfers, fetch_metrics, worker_id=worker_id, limit=facts.fetch_limit, stall_s=facts.fetch_stall_s
    )
    return FakeWorker(async_engine, admission, metrics, load, transfers, fetcher, kv_service, worker_id)


@dataclass
class Reply:
    """Everything that came for one key."""

    updates: list[SequenceUpdate] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    has_tokens: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for update in self.updates for token_id in update.token_ids]

    @property
    def last(self) -> SequenceUpdate:
        return self.updates[-1]

    @property
    def timings(self) -> Any:
        return next(update.timings for update in self.updates if update.HasField("timings"))


class FakeRouter:
    """One link, as a router has it."""

    def __init__(self, call: Any) -> None:
        self.responses: list[LinkResponse] = []
        self._call = call
        self._keys = itertools.count(1)
        self._replies: dict[int, Reply] = {}
        self._writing = asyncio.Lock()  # a call takes one write at a time

    async def submit(
        self,
        spec: SequenceSpec,
        prefill: FakeWorker | str = "",
        peer: KvPeer | None = None,
        *,
        branch_group: int = 0,
    ) -> tuple[int, Reply]:
        key = next(self._keys)
        reply = self._replies[key] = Reply()
        address = prefill if isinstance(prefill, str) else prefill.address
        submit = Submit(key=key, sequence=spec, prefill_address=address, peer=peer, branch_group=branch_group)
        await self.write(LinkRequest(submit=submit))
        return key, reply

    async def finish(
        self, spec: SequenceSpec, prefill: FakeWorker | str = "", peer: KvPeer | None = None
    ) -> Reply:
        _, reply = await self.submit(spec, prefill, peer)
        await reply.ended.wait()
        return reply

    async def cancel(self, key: int) -> None:
        await self.write(LinkRequest(cancel=Cancel(key=key)))

    async def write(self, request: LinkRequest) -> None:
        async with self._writing:
            await self._call.write(request)

    async def code(self) -> grpc.StatusCode:
        return await self._call.code()

    def cut(self) -> None:
        self._call.cancel()

    async def read(self) -> None:
        try:
            async for response in self._call:
                self.responses.append(response)
                for update in response.updates:
                    self._take(update)
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise

    def _take(self, update: SequenceUpdate) -> None:
        reply = self._replies[update.key]
        assert not reply.ended.is_set(), "an update after the last"
        reply.updates.append(update)
        if update.token_ids:
            reply.has_tokens.set()
        if update.finish_reason or update.HasField("error"):
            reply.ended.set()


@asynccontextmanager
async def router_link(decode: FakeWorker) -> AsyncIterator[FakeRouter]:
    async with build_channel(decode.address) as channel:
        method: Any = channel.stream_stream(
            f"/{LINK_SERVICE}/{LINK_METHOD}", LinkRequest.SerializeToString, LinkResponse.FromString
        )
        call = method()
        router = FakeRouter(call)
        reader = asyncio.create_task(router.read())
        try:
            yield router
        finally:
            call.cancel()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


def greedy_spec(prompt_ids: list[int], max_tokens: int = 8, **fields: Any) -> SequenceSpec:
    sampling = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "ignore_eos": True}
    sampling |= fields.pop("sampling", {})
    return SequenceSpec(
        request_id="test",
        prompt_ids=prompt_ids,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        **fields,
    )
