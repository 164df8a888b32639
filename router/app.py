"""Builds the router: every object once, in one place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from kvstore.api_key_mirror import ApiKeyMirror
from kvstore.api_keys import RedisApiKeys
from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex
from kvstore.prefix_index import PrefixIndex
from kvstore.quotas import RedisQuotas
from kvstore.registry import RedisRegistry, Registry
from kvstore.store import Store
from router.admin import add_admin, build_admin_app
from router.drain import Drain
from router.endpoints import add_endpoints
from router.exposure import warn_if_open
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from router.gate import Gate, GateRules
from router.generation_response import Serving
from router.http_errors import install_error_handlers
from router.metrics import RouterMetrics
from router.quota_gate import QuotaGate
from router.served_model import ServedModel, ServedModels, build_served_model
from router.settings import RouterSettings
from router.ui.access import UiAccess
from router.version import version
from router.vllm_metrics import add_vllm_metrics
from servicekit.loop_watch import watched_loop
from servicekit.metrics import build_metrics_registry
from servicekit.rpc import ChannelFactory, build_channel
from servicekit.tls import check_http_files, load_credentials
from servicekit.tracing import build_tracer


def build(
    settings: RouterSettings, *, registry: Registry | None = None, index: PrefixIndex | None = None
) -> FastAPI:
    """The application; app.state.serving holds its objects. ModelDirError when a model cannot be read.

    Workers and indexes are followed in Redis, unless `registry` and `index` are given, of the one model.
    """
    check_http_files(settings.http_tls_cert, settings.http_tls_key)
    mirrors: list[IndexMirror] = []
    store = Store(settings.redis_url) if registry is None or settings.require_api_key else None
    if registry is not None and index is not None:
        models = _models_of(settings, registry, index)
    else:
        assert store is not None
        models, mirrors = _models_in(settings, store)
    metrics_registry = build_metrics_registry()
    add_vllm_metrics(metrics_registry)
    keys = None
    quotas = None
    if settings.require_api_key:
        assert store is not None
        keys = ApiKeyMirror(RedisApiKeys(store), grace_s=settings.api_key_grace_s)
        quotas = RedisQuotas(store)
    serving = Serving(
        settings=settings,
        models=ServedModels(models),
        quotas=QuotaGate(quotas),
        metrics=RouterMetrics(metrics_registry, models),
        drain=Drain(),
        tracer=build_tracer(settings.otlp_endpoint, "router"),
    )
    fleets = {name: model.fleet for name, model in models.items()}
    FleetMetrics(metrics_registry, fleets, lambda: store is None or store.is_up)
    app = FastAPI(title="Baton", version=version(), lifespan=_lifespan(serving, store, mirrors, keys))
    app.state.serving = serving
    install_error_handlers(app)
    add_endpoints(app, serving, created=int(time.time()))
    access = UiAccess(settings.admin_key, keys)
    admin = app if settings.admin_port is None else build_admin_app(serving, access)
    app.state.admin_app = admin
    app.state.ui_publishers = add_admin(admin, serving, access, metrics_registry, is_public=admin is app)
    _guard({app, admin}, serving, keys)
    _allow_origins(app, settings.cors_origins)
    return app


def _lifespan(
    serving: Serving, store: Store | None, mirrors: Sequence[IndexMirror], keys: ApiKeyMirror | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs beside the requests, and its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(watched_loop())
            stack.push_async_callback(asyncio.to_thread, serving.tracer.close)
            if store is not None:
                stack.push_async_callback(store.close)
            for mirror in mirrors:
                stack.push_async_callback(_cancel, asyncio.create_task(mirror.run(), name="index mirror"))
            if keys is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(keys.run(), name="API keys"))
            warn_if_open(serving.settings)
            for model in serving.models:
                model.fleet.start()
                stack.push_async_callback(model.fleet.stop)
            yield

    return lifespan


def _models_of(settings: RouterSettings, registry: Registry, index: PrefixIndex) -> dict[str, ServedModel]:
    """The one model, over what the caller brings."""
    [source] = settings.models
    return {source.name: build_served_model(settings, source, Fleet(registry, _channels(settings)), index)}


def _models_in(settings: RouterSettings, store: Store) -> tuple[dict[str, ServedModel], list[IndexMirror]]:
    """All models, followed in Redis; the mirrors are still to be run."""
    channels = _channels(settings)
    models, mirrors = {}, []
    for source in settings.models:
        mirrored = MemoryIndex()
        mirrors.append(IndexMirror(store, source.name, mirrored))
        fleet = Fleet(RedisRegistry(store, source.name), channels)
        models[source.name] = build_served_model(settings, source, fleet, mirrored)
    return models, mirrors


def _channels(settings: RouterSettings) -> ChannelFactory:
    return partial(build_channel, credentials=load_credentials(settings.tls_files))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _guard(apps: Collection[FastAPI], serving: Serving, keys: ApiKeyMirror | None) -> None:
    rules = GateRules(keys=keys, max_concurrent_requests=serving.settings.max_concurrent_requests)
    for app in apps:
        app.add_middleware(Gate, rules=rules, metrics=serving.metrics)


def _allow_origins(app: FastAPI, cors_origins: str) -> None:
    origins = [origin.strip() for origin in cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
