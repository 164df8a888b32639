"""Builds the router: every object once, in one place; the HTTP endpoints over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2
from fastapi import FastAPI, Request
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
from router.api_types import ChatRequest, CompletionRequest
from router.chat_template import ChatTemplate
from router.drain import Drain
from router.exposure import warn_if_open
from router.fleet import Fleet
from router.gate import Gate, GateRules
from router.generation import GenerationBuilder
from router.generation_response import GenerationResponse, Serving
from router.http_errors import install_error_handlers
from router.metrics import RouterMetrics
from router.model_dir import ModelDir, ModelDirError, load_model_dir
from router.overload import OverloadGuard
from router.policy import PolicyConfig
from router.prompts import PromptReader
from router.quota_gate import QuotaGate
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
from servicekit.rpc import build_channel
from servicekit.tls import check_http_files, load_credentials
from servicekit.tracing import build_tracer


def build(
    settings: RouterSettings, *, registry: Registry | None = None, index: PrefixIndex | None = None
) -> FastAPI:
    """The application; app.state.serving holds its objects. ModelDirError when the model cannot be read.

    Without `registry` and `index` both are followed in Redis.
    """
    check_http_files(settings.http_tls_cert, settings.http_tls_key)
    is_alone = registry is not None and index is not None and not settings.require_api_key
    store = None if is_alone else Store(settings.redis_url)
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
    keys = None
    if settings.require_api_key:
        assert store is not None
        keys = ApiKeyMirror(RedisApiKeys(store), grace_s=settings.api_key_grace_s)
    serving = _build_serving(
        settings, _Sources(registry, index or mirrored, store), RouterMetrics(metrics_registry)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, serving.tracer.close)
            if store is not None:
                stack.push_async_callback(store.close)
            if mirror is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(mirror.run(), name="index mirror"))
            if keys is not None:
                stack.push_async_callback(_cancel, asyncio.create_task(keys.run(), name="API keys"))
            warn_if_open(settings)
            serving.fleet.start()
            stack.push_async_callback(serving.fleet.stop)
            yield

    app = FastAPI(title="Baton", version=version(), lifespan=lifespan)
    app.state.serving = serving
    app.state.metrics_registry = metrics_registry
    app.state.created = int(time.time())
    _add_endpoints(app)
    app.state.admin_app = _add_admin(app)
    _guard(app, GateRules(keys=keys, max_concurrent_requests=settings.max_concurrent_requests))
    install_api_schema(app, {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest})
    return app


@dataclass(frozen=True, slots=True)
class _Sources:
    registry: Registry
    index: PrefixIndex
    store: Store | None


def _build_serving(settings: RouterSettings, sources: _Sources, metrics: RouterMetrics) -> Serving:
    model_dir = load_model_dir(settings.model)
    tokenizer = Tokenizer.from_file(model_dir.tokenizer_file, model_dir.vocab_size)
    channels = partial(build_channel, credentials=load_credentials(settings.tls_files))
    fleet = Fleet(sources.registry, channels)
    quotas = RedisQuotas(sources.store) if settings.require_api_key and sources.store else None
    return Serving(
        settings=settings,
        model_dir=model_dir,
        tokenizer=tokenizer,
        prompts=PromptReader(tokenizer, _chat_template(model_dir)),
        generations=GenerationBuilder(tokenizer, model_dir.sampling_defaults, settings.max_sequences),
        fleet=fleet,
        planner=RoutePlanner(
            fleet,
            sources.index,
            PolicyConfig(
                name=settings.policy,
                temperature_s=settings.policy_temperature_s,
                local_prefill_max_tokens=settings.local_prefill_max_tokens,
            ),
        ),
        overload=OverloadGuard(settings.max_queue_wait_s),
        quotas=QuotaGate(quotas),
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

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version()}

    install_error_handlers(app)
    _add_health(app, serving)


def _add_health(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """This process answers; nothing about workers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """A request sent now would be served."""
        status = "draining" if serving.drain.is_draining else "no decode worker"
        is_ready = serving.fleet.is_ready and not serving.drain.is_draining
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


def _add_ui(admin: FastAPI, app: FastAPI, access: UiAccess) -> None:
    serving: Serving = app.state.serving
    drain = serving.drain
    about = {"model": serving.settings.model_name, "version": version()}
    snapshots = Snapshots(serving.fleet, drain, serving.metrics, about)
    publisher = Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
    app.state.ui_publisher = publisher
    add_ui(admin, access, publisher)


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
