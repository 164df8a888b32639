"""Metrics and the live page: on a port of their own, or beside the public endpoints.

The page may call its own origin only. So where it has a port of its own, that port serves the one endpoint
that its playground needs: with API keys to whoever has one, without to whoever may see the page.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from router.endpoint import CHAT
from router.endpoints import add_generation, add_health
from router.generation_response import Serving
from router.http_errors import install_error_handlers
from router.served_model import ServedModel
from router.ui.access import UiAccess
from router.ui.endpoints import add_ui
from router.ui.publisher import Publisher
from router.ui.snapshot import Snapshots
from router.version import version
from servicekit.metrics import render_metrics


def build_admin_app(serving: Serving, access: UiAccess) -> FastAPI:
    """For the admin port; add_admin() adds what it is for."""
    admin = FastAPI(title="Baton admin", version=version(), openapi_url=None)
    install_error_handlers(admin)
    add_health(admin, serving)
    asks_for_keys = serving.settings.require_api_key  # the gate does
    add_generation(admin, serving, CHAT, check=None if asks_for_keys else access.check_data)
    return admin


def add_admin(
    app: FastAPI,
    serving: Serving,
    access: UiAccess,
    metrics_registry: CollectorRegistry,
    *,
    is_public: bool,
) -> dict[str, Publisher]:
    """`is_public`: strangers reach `app`. Returns what feeds the live page, by model."""
    guards_metrics = is_public and serving.settings.require_api_key

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if guards_metrics:
            await access.check_data(request)
        page, content_type = render_metrics(metrics_registry)
        return Response(page, headers={"content-type": content_type})

    publishers = {model.name: _publisher(serving, model) for model in serving.models}
    add_ui(app, access, publishers)
    return publishers


def _publisher(serving: Serving, model: ServedModel) -> Publisher:
    drain = serving.drain
    names = [each.name for each in serving.models]
    about = {"model": model.name, "models": names, "version": version()}
    snapshots = Snapshots(model.fleet, drain, serving.metrics.of(model.name), about)
    return Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
