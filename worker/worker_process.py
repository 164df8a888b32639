"""The life of a worker process.

1. Build: the engine loads its weights; a mistake in settings or checkpoint ends the process with
   EXIT_MISTAKE.
2. Serve: gRPC and metrics listen, then the worker announces itself; from here on routers find it.
3. Drain, on SIGTERM or when another rank of the group drains: routers are told, new requests are refused,
   running ones finish or are cut off at the end of the grace period and go on elsewhere.
4. End: the entry in the registry goes, the engine stops.

A failed engine ends the process with EXIT_FAILED: with collectives in flight nothing is safe to continue,
and closed connections tell everybody.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NoReturn, Protocol

import grpc
import uvloop
from prometheus_client import CollectorRegistry

from engine.engine import Engine
from engine.ep.ep_group import EpGroupLost
from engine.grammar.compiler import compiler_for_model
from engine.outputs import StepOutput
from kvstore.redis_index import RedisIndex
from kvstore.registry import RedisRegistry, WorkerRecord, WorkerRole
from kvstore.store import Store
from servicekit.descriptors import reserve_descriptors
from servicekit.errors import WorkerLost
from servicekit.garbage import exempt_from_garbage_search
from servicekit.host import host_id, reachable_host
from servicekit.lifecycle import drain_on_signals
from servicekit.logging import get_logger
from servicekit.loop_watch import watched_loop
from servicekit.metrics import MetricsServer, build_metrics_registry
from servicekit.rpc import build_channel, build_server
from servicekit.tls import Credentials, load_credentials
from servicekit.tracing import Tracer, build_tracer
from worker.admission import Admission
from worker.async_engine import AsyncEngine
from worker.build_engine import EpMembership, build_worker_engine, resolve_membership
from worker.engine_metrics import EngineMetrics
from worker.fetch_metrics import FetchMetrics
from worker.health import WorkerHealth
from worker.kv_service import KvService
from worker.launch import EXIT_MISTAKE
from worker.load import LoadMeter
from worker.peer_fetcher import PeerFetcher
from worker.registration import LEASE_S, Registration
from worker.settings import WorkerSettings
from worker.state_page import StatePage
from worker.step_log import log_step
from worker.transfers import TransferEnvironment
from worker.vllm_metrics import add_vllm_metrics
from worker.worker_metrics import WorkerMetrics

__all__ = ["EpMembership", "Service", "WorkerParts", "WorkerProcess"]

EXIT_FAILED = 1
_OUTBOX_BYTES = 2 << 30  # sixteen prompts of 4096 tokens of DeepSeek-V2-Lite
_STOP_S = 10.0  # for the step in which the engine is

log = get_logger(__name__)


class Service(Protocol):
    def handler(self) -> grpc.GenericRpcHandler[Any, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """What a service is built from."""

    settings: WorkerSettings
    worker_id: str
    engine: AsyncEngine
    admission: Admission
    load: LoadMeter
    metrics: CollectorRegistry
    state: StatePage
    transfers: TransferEnvironment
    fetcher: PeerFetcher
    kv_service: KvService


class WorkerProcess:
    def __init__(
        self,
        role: WorkerRole,
        settings: WorkerSettings,
        build_service: Callable[[WorkerParts], Service],
        membership: EpMembership | None = None,
    ) -> None:
        self._role = role
        self._settings = _with_outbox(settings) if role == "prefill" else settings
        self._build_service = build_service
        self._membership = membership or EpMembership()
        self._worker_id = settings.worker_id or f"{role}-{secrets.token_hex(4)}"

    def run(self) -> int:
        """The exit code."""
        try:
            credentials = load_credentials(self._settings.tls_files)
            store = Store(self._settings.redis_url)
            tracer = build_tracer(self._settings.otlp_endpoint, self._role, self._worker_id)
            self._membership = resolve_membership(self._settings, self._membership)
            engine = build_worker_engine(self._settings, self._membership)
        except (ValueError, OSError) as error:
            log.error("cannot_start", reason=str(error))
            return EXIT_MISTAKE
        except EpGroupLost as error:
            log.error("group_lost", reason=str(error))
            return EXIT_FAILED
        try:
            return uvloop.run(self._serve(engine, store, tracer, credentials))
        except OSError as error:
            log.error("cannot_start", reason=str(error))
            return EXIT_MISTAKE

    async def _serve(
        self, engine: Engine, store: Store, tracer: Tracer, credentials: Credentials | None
    ) -> int:
        parts = self._build_parts(engine, tracer, credentials)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, tracer.close)
            stack.enter_context(watched_loop())
            drain = stack.enter_context(drain_on_signals())
            service = self._build_service(parts)
            stack.push_async_callback(parts.transfers.close)
            health = WorkerHealth(asyncio.get_running_loop(), parts.engine, parts.admission)
            WorkerMetrics(parts.metrics, lambda: parts.admission.num_requests, lambda: store.is_up)
            metrics_server = MetricsServer(
                parts.metrics,
                self._settings.host,
                self._settings.metrics_port,
                pages={"/state": parts.state},
                checks={"/healthz": health.alive, "/readyz": health.ready},
            )
            metrics_port = metrics_server.start()
            stack.callback(metrics_server.stop)
            server, port = build_server(
                [service.handler(), parts.kv_service.handler()],
                host=self._settings.host,
                port=self._settings.port,
                credentials=credentials,
            )
            if engine.ep is not None:
                stack.callback(engine.ep.close)
            record = self._record(parts, port, metrics_port)
            index = RedisIndex(store, record.model, record.worker_id, record.incarnation, lease_s=LEASE_S)
            parts.engine.subscribe(lambda step: _publish(index, step))  # before the first step has any
            parts.engine.start()
            stack.push_async_callback(parts.engine.stop, self._stop_s)
            stack.push_async_callback(parts.fetcher.close)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            stack.push_async_callback(store.close)
            registration = Registration(RedisRegistry(store, record.model), record, parts.load.load)
            health.watch(registration)
            reserve_descriptors()
            exempt_from_garbage_search()
            return await self._until_end(parts, registration, record, index, drain)

    @property
    def _stop_s(self) -> float:
        """The other ranks of a group may drain for all of their time and need this one's collectives."""
        return _STOP_S + (self._settings.drain_s if self._membership.size > 1 else 0.0)

    def _build_parts(self, engine: Engine, tracer: Tracer, credentials: Credentials | None) -> WorkerParts:
        admission = Admission(self._settings.max_requests)
        load = LoadMeter(admission, engine.num_blocks)
        admission.retry_after_s = load.retry_after_s
        metrics = build_metrics_registry()
        grammars = compiler_for_model(self._settings.model, engine.vocab_size, engine.eos_token_ids)
        async_engine = AsyncEngine(engine, grammars)
        engine_metrics = EngineMetrics(metrics, engine.num_blocks)
        grammars.on_compiled = engine_metrics.grammars.observe_compile
        block_size = engine.kv_layout.block_size
        add_vllm_metrics(metrics, self._role, self._settings.model_name, block_size, engine.num_blocks)
        for observer in (load, engine_metrics):
            async_engine.subscribe(observer.observe)
            async_engine.subscribe_load(observer.observe_load)
        if log.shows_debug:
            async_engine.subscribe(log_step)
        transfers = TransferEnvironment.build(
            async_engine,
            self._settings.host_id or host_id(),
            accepts_shared_memory=self._settings.shared_memory,
            accepts_device_memory=self._settings.shared_memory and self._settings.device_memory,
            channels=partial(build_channel, credentials=credentials),
            tracer=tracer,
        )
        fetch_metrics = FetchMetrics(metrics)
        fetcher = PeerFetcher(transfers, fetch_metrics, worker_id=self._worker_id)
        load.add_kv_rates(transfers.rates.kv_rates)
        load.add_kv_rates(fetcher.rates.kv_rates)
        load.add_kv_rates(engine_metrics.tiers.kv_rates)
        return WorkerParts(
            settings=self._settings,
            worker_id=self._worker_id,
            engine=async_engine,
            admission=admission,
            load=load,
            metrics=metrics,
            state=StatePage(engine_metrics),
            transfers=transfers,
            fetcher=fetcher,
            kv_service=KvService(transfers, fetch_metrics, worker_id=self._worker_id),
        )

    def _record(self, parts: WorkerParts, port: int, metrics_port: int) -> WorkerRecord:
        host = self._settings.advertised_host or reachable_host(self._settings.host, self._settings.redis_url)
        engine = parts.engine.engine
        return WorkerRecord(
            worker_id=self._worker_id,
            incarnation=secrets.token_hex(8),
            role=self._role,
            model=self._settings.model_name,
            address=f"{host}:{port}",
            metrics_address=f"{host}:{metrics_port}",
            group_id=self._membership.group_id or self._worker_id,
            ep_rank=self._membership.rank,
            ep_size=self._membership.size,
            model_fingerprint=engine.kv_layout.model_fingerprint,
            layout_fingerprint=engine.kv_layout.fingerprint,
            block_size=engine.kv_layout.block_size,
            max_model_len=engine.max_model_len,
            num_blocks=engine.num_blocks,
            max_running=engine.max_running,
            host_id=parts.transfers.host_id,
            block_bytes=engine.kv_layout.block_bytes,
            cpu_share=self._settings.cpu_share,
        )

    async def _until_end(
        self,
        parts: WorkerParts,
        registration: Registration,
        record: WorkerRecord,
        index: RedisIndex,
        drain: asyncio.Event,
    ) -> int:
        _drain_with_group(parts.engine, drain)
        index.start()
        try:
            async with asyncio.TaskGroup() as group:
                watchers = [
                    group.create_task(registration.run()),
                    group.create_task(_fail_with(parts.engine)),
                    group.create_task(_log_ready(registration, record)),
                ]
                await drain.wait()
                log.info("draining", num_requests=parts.admission.num_requests)
                registration.start_draining()
                is_empty = await parts.admission.drain(self._settings.drain_s)
                log.info("drained", is_empty=is_empty, num_cut_off=parts.admission.num_requests)
                for watcher in watchers:
                    watcher.cancel()
        except* WorkerLost as errors:
            log.error("worker_failed", reason="; ".join(map(str, errors.exceptions)))
            return_code = EXIT_FAILED
        else:
            return_code = 0
        finally:
            await registration.withdraw()
            await index.stop()
        return return_code


def _publish(index: RedisIndex, step: StepOutput) -> None:
    events = step.block_events
    if events.removed:
        index.evict(events.removed)
    for tier, placed in groupby(events.placed, key=itemgetter(1)):
        index.publish((block_hash for block_hash, _ in placed), tier)


async def _fail_with(engine: AsyncEngine) -> NoReturn:
    error = await engine.failure
    log.error("engine_failed", traceback="".join(traceback.format_exception(error)))
    raise WorkerLost(f"the engine failed: {type(error).__name__}: {error}")


async def _log_ready(registration: Registration, record: WorkerRecord) -> None:
    await registration.is_announced.wait()
    log.info(
        "ready",
        worker_id=record.worker_id,
        role=record.role,
        address=record.address,
        metrics_address=record.metrics_address,
        num_blocks=record.num_blocks,
        max_model_len=record.max_model_len,
    )


def _drain_with_group(engine: AsyncEngine, drain: asyncio.Event) -> None:
    """A rank cannot go on alone: when one leaves, all drain."""
    ep = engine.engine.ep
    if ep is None:
        return

    def on_change() -> None:
        if ep.leaving_ranks:
            engine.in_loop(drain.set)

    ep.subscribe(on_change)


def _with_outbox(settings: WorkerSettings) -> WorkerSettings:
    """Unless it was asked for: KV leaves a device through host memory, and any other memory at once."""
    if settings.outbox_bytes is not None or settings.device == "cpu":
        return settings
    return replace(settings, outbox_bytes=_OUTBOX_BYTES)
