"""How a decode service is put together."""

from __future__ import annotations

from decode_svc.link_service import LinkService
from decode_svc.metrics import DecodeMetrics
from decode_svc.request import RequestEnvironment
from worker.worker_process import WorkerParts


def build_service(parts: WorkerParts) -> LinkService:
    environment = RequestEnvironment(
        transfers=parts.transfers,
        fetcher=parts.fetcher,
        admission=parts.admission,
        metrics=DecodeMetrics(parts.metrics),
    )
    return LinkService(environment, parts.load)
