"""The public HTTP endpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from router.api_schema import install_api_schema
from router.caller import caller_of
from router.endpoint import ENDPOINTS, Endpoint
from router.generation_response import GenerationResponse, Serving
from router.plain_route import PlainRoute
from router.served_model import ServedModel
from router.token_endpoints import TOKEN_BODIES, add_token_endpoints
from router.version import version


def add_endpoints(app: FastAPI, serving: Serving, created: int) -> None:
    """`created`: of the models, as clients are told; seconds since 1970."""
    for endpoint in ENDPOINTS:
        add_generation(app, serving, endpoint)
    add_token_endpoints(app, serving)

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        """Those that the caller may use."""
        caller = caller_of(request)
        models = [model for model in serving.models if caller.may_use(model.name)]
        return {"object": "list", "data": [_model_card(model, created) for model in models]}

    @app.get("/v1/models/{model_id:path}")
    async def show_model(request: Request, model_id: str) -> dict[str, Any]:
        return _model_card(serving.models.named(model_id, caller_of(request)), created)

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

    add_health(app, serving)
    bodies: dict[str, type[BaseModel]] = {endpoint.path: endpoint.body for endpoint in ENDPOINTS}
    install_api_schema(app, bodies | TOKEN_BODIES)


def add_health(app: FastAPI, serving: Serving) -> None:
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


def add_generation(
    app: FastAPI,
    serving: Serving,
    endpoint: Endpoint,
    check: Callable[[Request], Awaitable[None]] | None = None,
) -> None:
    """`check` raises ServingError for whom it does not want."""

    async def generate(request: Request) -> Response:
        if check is not None:
            await check(request)
        return GenerationResponse(serving, request, endpoint)

    app.router.add_api_route(
        endpoint.path, generate, methods=["POST"], name=endpoint.name, route_class_override=PlainRoute
    )


def _model_card(model: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": model.name,
        "max_model_len": model.max_model_len,
    }
