"""Builds the router: every object once, in one place; the HTTP endpoints over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex
from kvstore.prefix_index import PrefixIndex
from kvstore.registry import RedisRegistry, Registry
from kvstore.store import Store
from router.api_schema import install_api_schema
from router.drain import Drain
from router.endpoint import ENDPOINTS, Endpoint
from router.fleet_metrics import FleetMetrics
from router.generation_response import GenerationResponse, Serving
from router.http_errors import install_error_handlers
from router.metrics import RouterMetrics
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
from servicekit.tracing import build_tracer


def build(
    settings: RouterSettings, *, registry: Registry | None = None, index: PrefixIndex | None = None
) -> FastAPI:
    """The application; app.state.serving holds its objects. ModelDirError when a model cannot be read.

    Workers and indexes are followed in Redis, unless `registry` and `index` are given, of the one model.
    """
    store = Store(settings.redis_url) if registry is None else None
    mirrors: list[IndexMirror] = []
    models: dict[str, ServedModel] = {}
    for source in settings.models:
        if store is None:
            assert registry is not None and index is not None and not models
            models[source.name] = build_served_model(settings, source, registry, index)
        else:
            mirrored = MemoryIndex()
            mirrors.append(IndexMirror(store, source.name, mirrored))
            workers = RedisRegistry(store, source.name)
            models[source.name] = build_served_model(settings, source, workers, mirrored)
    metrics_registry = build_metrics_registry()
    add_vllm_metrics(metrics_registry, settings.model_name)
    serving = Serving(
        settings=settings,
        models=ServedModels(models),
        metrics=RouterMetrics(metrics_registry),
        drain=Drain(),
        tracer=build_tracer(settings.otlp_endpoint, "router"),
    )
    fleets = {name: model.fleet for name, model in models.items()}
    FleetMetrics(metrics_registry, fleets, lambda: store is None or store.is_up)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, serving.tracer.close)
            if store is not None:
                stack.push_async_callback(store.close)
            for mirror in mirrors:
                stack.push_async_callback(_cancel, asyncio.create_task(mirror.run(), name="index mirror"))
            for model in serving.models:
                model.fleet.start()
                stack.push_async_callback(model.fleet.stop)
            yield

    app = FastAPI(title="Baton", version=version(), lifespan=lifespan)
    app.state.serving = serving
    app.state.metrics_registry = metrics_registry
    app.state.created = int(time.time())
    install_error_handlers(app)
    _add_endpoints(app)
    _add_ui(app)
    add_token_endpoints(app, serving)
    bodies: dict[str, type[BaseModel]] = {endpoint.path: endpoint.body for endpoint in ENDPOINTS}
    install_api_schema(app, bodies | TOKEN_BODIES)
    return app


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

    @app.get("/metrics")
    async def metrics() -> Response:
        page, content_type = render_metrics(app.state.metrics_registry)
        return Response(page, headers={"content-type": content_type})

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


def _add_generation(app: FastAPI, endpoint: Endpoint) -> None:
    async def generate(request: Request) -> Response:
        return GenerationResponse(app.state.serving, request, endpoint)

    app.add_api_route(endpoint.path, generate, methods=["POST"], name=endpoint.name)


def _add_ui(app: FastAPI) -> None:
    serving: Serving = app.state.serving
    drain = serving.drain
    about = {"model": serving.settings.model_name, "version": version()}
    snapshots = Snapshots(serving.fleet, drain, serving.metrics, about)
    publisher = Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
    app.state.ui_publisher = publisher
    add_ui(app, UiAccess(serving.settings.admin_key), publisher)


def _model_card(app: FastAPI, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": app.state.created,
        "owned_by": "baton",
        "root": model.name,
        "max_model_len": model.max_model_len,
    }
