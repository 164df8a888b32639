"""Metrics and the live page: on a port of their own, or beside the public endpoints."""

from __future__ import annotations

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from router.endpoints import add_health
from router.generation_response import Serving
from router.http_errors import install_error_handlers
from router.ui.access import UiAccess
from router.ui.endpoints import add_ui
from router.ui.publisher import Publisher
from router.ui.snapshot import Snapshots
from router.version import version
from servicekit.metrics import render_metrics


def build_admin_app(serving: Serving) -> FastAPI:
    """For the admin port; add_admin() adds what it is for."""
    admin = FastAPI(title="Baton admin", version=version(), openapi_url=None)
    install_error_handlers(admin)
    add_health(admin, serving)
    return admin


def add_admin(
    app: FastAPI, serving: Serving, metrics_registry: CollectorRegistry, *, is_public: bool
) -> Publisher:
    """`is_public`: strangers reach `app`. Returns what feeds the live page."""
    access = UiAccess(serving.settings.admin_key)
    guards_metrics = is_public and serving.settings.require_api_key

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if guards_metrics:
            access.check_data(request)
        page, content_type = render_metrics(metrics_registry)
        return Response(page, headers={"content-type": content_type})

    drain = serving.drain
    about = {"model": serving.settings.model_name, "version": version()}
    snapshots = Snapshots(serving.fleet, drain, serving.metrics, about)
    publisher = Publisher(snapshots, lambda: drain.is_draining and not drain.num_open)
    add_ui(app, access, publisher)
    return publisher
