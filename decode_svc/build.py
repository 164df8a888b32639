"""How a decode service is put together."""

from __future__ import annotations

from decode_svc.handoff import HandoffEnvironment
from decode_svc.link_service import LinkService
from decode_svc.metrics import DecodeMetrics
from decode_svc.prefill_channels import PrefillChannels
from decode_svc.request import RequestEnvironment
from decode_svc.shared_caches import SharedCaches
from worker.worker_process import WorkerParts


def build_service(parts: WorkerParts) -> LinkService:
    handoffs = HandoffEnvironment(
        engine=parts.engine,
        channels=PrefillChannels(),
        shared_caches=SharedCaches(parts.engine.engine.kv_layout),
        host_id=parts.host_id,
        accepts_shared_memory=parts.settings.shared_memory,
        tracer=parts.tracer,
    )
    environment = RequestEnvironment(
        handoffs=handoffs, admission=parts.admission, metrics=DecodeMetrics(parts.metrics)
    )
    return LinkService(environment, parts.load)
