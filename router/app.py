"""Builds the router: every object once, in one place; the HTTP endpoints over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex
from kvstore.prefix_index import PrefixIndex
from kvstore.registry import RedisRegistry, Registry
from kvstore.store import Store
from router.api_schema import install_api_schema
from router.api_types import ChatRequest, CompletionRequest
from router.chat_template import ChatTemplate
from router.drain import Drain
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from router.generation import GenerationBuilder
from router.generation_response import GenerationResponse, Serving
from router.http_errors import install_error_handlers
from router.metrics import RouterMetrics
from router.model_dir import ModelDir, ModelDirError, load_model_dir
from router.policy import PolicyConfig
from router.prompts import PromptReader
from router.route_planner import RoutePlanner
from router.settings import RouterSettings
from router.tokenizer import Tokenizer
from router.ui.access import UiAccess
from router.ui.endpoints import add_ui
from router.ui.publisher import Publisher
from router.ui.snapshot import Snapshots
from router.version import version
from router.vllm_metrics import add_vllm_metrics
from servicekit.errors import InvalidRequest
from servicekit.metrics import build_metrics_registry, render_metrics
from servicekit.tracing import build_tracer


def build(
    settings: RouterSettings, *, registry: Registry | None = None, index: PrefixIndex | None = None
) -> FastAPI:
    """The application; app.state.serving holds its objects. ModelDirError when the model cannot be read.

    Without `registry` and `index` both are followed in Redis.
    """
    store = Store(settings.redis_url) if registry is None or index is None else None
    mirrored = MemoryIndex()
    mirror = None
    if index is None:
        assert store is not None
        mirror = IndexMirror(store, settings.model_name, mirrored)
    if registry is None:
        assert store is not None
        registry = RedisRegistry(store, settings.model_name)
    metrics_registry = build_metrics_registry()
    add_vllm_metrics(metrics_registry, settings.model_name)
    serving = _build_serving(settings, registry, index or mirrored, RouterMetrics(metrics_registry))
    FleetMetrics(metrics_registry, serving.fleet, lambda: store is None or store.is_up)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, serving.tracer.close)
            if store is not None:
                stack.push_async_callback(store.close)
            if mirror is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(mirror.run(), name="index mirror"))
            serving.fleet.start()
            stack.push_async_callback(serving.fleet.stop)
            yield

    app = FastAPI(title="Baton", version=version(), lifespan=lifespan)
    app.state.serving = serving
    app.state.metrics_registry = metrics_registry
    app.state.created = int(time.time())
    install_error_handlers(app)
    _add_endpoints(app)
    _add_ui(app)
    install_api_schema(app, {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest})
    return app


def _build_serving(
    settings: RouterSettings, registry: Registry, index: PrefixIndex, metrics: RouterMetrics
) -> Serving:
    model_dir = load_model_dir(settings.model)
    tokenizer = Tokenizer.from_file(model_dir.tokenizer_file, model_dir.vocab_size)
    fleet = Fleet(registry)
    return Serving(
        settings=settings,
        model_dir=model_dir,
        tokenizer=tokenizer,
        prompts=PromptReader(tokenizer, _chat_template(model_dir)),
        generations=GenerationBuilder(tokenizer, model_dir.sampling_defaults, settings.max_sequences),
        fleet=fleet,
        planner=RoutePlanner(
            fleet,
            index,
            PolicyConfig(
                name=settings.policy,
                temperature_s=settings.policy_temperature_s,
                local_prefill_max_tokens=settings.local_prefill_max_tokens,
            ),
        ),
        metrics=metrics,
        drain=Drain(),
        tracer=build_tracer(settings.otlp_endpoint, "router"),
    )


def _chat_template(model_dir: ModelDir) -> ChatTemplate | None:
    if model_dir.chat_template is None:
        return None
    try:
        return ChatTemplate(model_dir.chat_template, model_dir.special_tokens)
    except jinja2.TemplateSyntaxError as error:
        raise ModelDirError(
            f"{model_dir.path}: chat template, line {error.lineno}: {error.message}"
        ) from error


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _add_endpoints(app: FastAPI) -> None:
    serving: Serving = app.state.serving

    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return GenerationResponse(serving, request, ChatRequest)

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return GenerationResponse(serving, request, CompletionRequest)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(app)]}

    @app.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> dict[str, Any]:
        if model_id != serving.settings.model_name:
            raise InvalidRequest(
                f"the model {model_id!r} does not exist", param="model", code="model_not_found"
            )
        return _model_card(app)

    @app.get("/health")
    async def health() -> Response:
        """This process answers and still follows the registry; nothing about workers."""
        has_failed = serving.fleet.has_failed
        return JSONResponse({"status": "failed" if has_failed else "ok"}, 503 if has_failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """A request sent now would be served."""
        status = "draining" if serving.drain.is_draining else "no decode worker"
        is_ready = serving.fleet.is_ready and not serving.drain.is_draining
        return JSONResponse({"status": "ready" if is_ready else status}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        page, content_type = render_metrics(app.state.metrics_registry)
        return Response(page, headers={"content-type": content_type})

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version()}


def _add_ui(app: FastAPI) -> None:
    serving: Serving = app.state.serving
    drain = serving.drain
    about = {"model": serving.settings.model_name, "version": version()}
    snapshots = Snapshots(serving.fleet, drain, serving.metrics, about)
    publisher = Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
    app.state.ui_publisher = publisher
    add_ui(app, UiAccess(serving.settings.admin_key), publisher)


def _model_card(app: FastAPI) -> dict[str, Any]:
    serving: Serving = app.state.serving
    name = serving.settings.model_name
    return {
        "id": name,
        "object": "model",
        "created": app.state.created,
        "owned_by": "baton",
        "root": name,
        "max_model_len": serving.max_model_len,
    }
