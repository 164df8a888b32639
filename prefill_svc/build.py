"""How a prefill service is put together."""

from __future__ import annotations

from prefill_svc.metrics import PrefillMetrics
from prefill_svc.prefill_service import PrefillService
from worker.worker_process import WorkerParts


def build_service(parts: WorkerParts) -> PrefillService:
    return PrefillService(
        parts.transfers,
        parts.fetcher,
        parts.admission,
        PrefillMetrics(parts.metrics),
        worker_id=parts.worker_id,
    )
