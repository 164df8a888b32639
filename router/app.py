"""Builds the router: every object once, in one place; the HTTP endpoints over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from kvstore.api_key_mirror import ApiKeyMirror
from kvstore.api_keys import RedisApiKeys
from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex
from kvstore.prefix_index import PrefixIndex
from kvstore.quotas import RedisQuotas
from kvstore.registry import RedisRegistry, Registry
from kvstore.store import Store
from router.api_schema import install_api_schema
from router.drain import Drain
from router.endpoint import ENDPOINTS, Endpoint
from router.exposure import warn_if_open
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from router.gate import Gate, GateRules
from router.generation_response import GenerationResponse, Serving
from router.http_errors import install_error_handlers
from router.metrics import RouterMetrics
from router.quota_gate import QuotaGate
from router.served_model import ServedModel, ServedModels, build_served_model
from router.settings import RouterSettings
from router.token_endpoints import TOKEN_BODIES, add_token_endpoints
from router.ui.access import UiAccess
from router.ui.endpoints import add_ui
from router.ui.publisher import Publisher
from router.ui.snapshot import Snapshots
from router.version import version
from router.vllm_metrics import add_vllm_metrics
from servicekit.metrics import build_metrics_registry, render_metrics
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
    add_vllm_metrics(metrics_registry, settings.model_name)
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
        metrics=RouterMetrics(metrics_registry),
        drain=Drain(),
        tracer=build_tracer(settings.otlp_endpoint, "router"),
    )
    fleets = {name: model.fleet for name, model in models.items()}
    FleetMetrics(metrics_registry, fleets, lambda: store is None or store.is_up)
    app = FastAPI(title="Baton", version=version(), lifespan=_lifespan(serving, store, mirrors, keys))
    app.state.serving = serving
    app.state.metrics_registry = metrics_registry
    app.state.created = int(time.time())
    _add_endpoints(app)
    app.state.admin_app = _add_admin(app)
    _guard(app, GateRules(keys=keys, max_concurrent_requests=settings.max_concurrent_requests))
    add_token_endpoints(app, serving)
    bodies: dict[str, type[BaseModel]] = {endpoint.path: endpoint.body for endpoint in ENDPOINTS}
    install_api_schema(app, bodies | TOKEN_BODIES)
    return app


def _lifespan(
    serving: Serving, store: Store | None, mirrors: Sequence[IndexMirror], keys: ApiKeyMirror | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs beside the requests, and its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
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


def _add_endpoints(app: FastAPI) -> None:
    serving: Serving = app.state.serving

    for endpoint in ENDPOINTS:
        _add_generation(app, endpoint)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(app, model) for model in serving.models]}

    @app.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> dict[str, Any]:
        return _model_card(app, serving.models.named(model_id))

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Open requests here, and sequences running and waiting on the decode workers."""
        links = [link for model in serving.models for _, link in model.fleet.decode_workers()]
        loads = [link.load for link in links if link.load is not None]
        return {
            "server_load": serving.drain.num_open,
            "num_running": sum(each.num_running for each in loads),
            "num_waiting": sum(each.num_waiting for each in loads),
        }

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version()}

    install_error_handlers(app)
    _add_health(app, serving)


def _add_health(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> Response:
        """This process answers and still follows the registry; nothing about workers."""
        has_failed = any(model.fleet.has_failed for model in serving.models)
        return JSONResponse({"status": "failed" if has_failed else "ok"}, 503 if has_failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """A request sent now would be served."""
        status = "draining" if serving.drain.is_draining else "no decode worker"
        is_ready = any(model.fleet.is_ready for model in serving.models) and not serving.drain.is_draining
        return JSONResponse({"status": "ready" if is_ready else status}, 200 if is_ready else 503)


def _add_admin(app: FastAPI) -> FastAPI:
    """Metrics and the live page: on the application that is returned."""
    serving: Serving = app.state.serving
    settings = serving.settings
    access = UiAccess(settings.admin_key)
    admin = app
    if settings.admin_port is not None:
        admin = FastAPI(title="Baton admin", version=version(), openapi_url=None)
        install_error_handlers(admin)
        _add_health(admin, serving)

    @admin.get("/metrics")
    async def metrics(request: Request) -> Response:
        if admin is app and settings.require_api_key:
            access.check_data(request)  # strangers reach this port
        page, content_type = render_metrics(app.state.metrics_registry)
        return Response(page, headers={"content-type": content_type})

    _add_ui(admin, app, access)
    return admin


def _guard(app: FastAPI, rules: GateRules) -> None:
    serving: Serving = app.state.serving
    app.add_middleware(Gate, rules=rules, metrics=serving.metrics)
    origins = [origin.strip() for origin in serving.settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )


def _add_generation(app: FastAPI, endpoint: Endpoint) -> None:
    async def generate(request: Request) -> Response:
        return GenerationResponse(app.state.serving, request, endpoint)

    app.add_api_route(endpoint.path, generate, methods=["POST"], name=endpoint.name)


def _add_ui(admin: FastAPI, app: FastAPI, access: UiAccess) -> None:
    serving: Serving = app.state.serving
    drain = serving.drain
    about = {"model": serving.settings.model_name, "version": version()}
    snapshots = Snapshots(serving.fleet, drain, serving.metrics, about)
    publisher = Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
    app.state.ui_publisher = publisher
    add_ui(admin, access, publisher)


def _model_card(app: FastAPI, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": app.state.created,
        "owned_by": "baton",
        "root": model.name,
        "max_model_len": model.max_model_len,
    }
