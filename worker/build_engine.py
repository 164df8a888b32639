"""From a worker's settings to its engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil

from engine.build import build_engine
from engine.checkpoint.model_config import load_model_config
from engine.engine import Engine
from engine.engine_config import EngineConfig
from engine.ep.ep_group import EpGroup
from servicekit.logging import get_logger
from worker.settings import WorkerSettings

# Ranks start together but read their weights at different speeds.
_PEERS_TIMEOUT_S = 600.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpMembership:
    group_id: str = ""  # empty: the worker is a group of its own
    rank: int = 0
    size: int = 1
    address: str = ""  # host:port where rank 0 listens


def resolve_membership(settings: WorkerSettings, asked: EpMembership) -> EpMembership:
    """`asked`, or a group of one where the model has no experts: ranks that share none would only wait for
    each other. So a deployment with groups serves dense models too. ValueError for an unreadable checkpoint.
    """
    if asked.size == 1 or load_model_config(settings.model).moe is not None:
        return asked
    log.warning("serving_alone", reason="the model has no experts to share out", ep_size=asked.size)
    return EpMembership()


def build_worker_engine(settings: WorkerSettings, membership: EpMembership) -> Engine:
    """Loads weights, seconds to minutes. ValueError for a checkpoint or settings that cannot work."""
    group = _join(membership) if membership.size > 1 else None
    # Since the process's first moment: interpreter, torch.
    phases = {"imports": time.time() - psutil.Process().create_time()}
    engine = build_engine(_engine_config(settings), group, _LoadProgress())
    for phase, elapsed_s in (phases | engine.start_times.seconds).items():
        log.info("start_phase", phase=phase, elapsed_s=elapsed_s)
    if group is not None:
        group.wait_for_peers(_PEERS_TIMEOUT_S)
    return engine


def _join(membership: EpMembership) -> EpGroup:
    log.info("joining_group", group_id=membership.group_id, rank=membership.rank, size=membership.size)
    return EpGroup(membership.rank, membership.size, membership.address)


def _engine_config(settings: WorkerSettings) -> EngineConfig:
    names = ("kv_cache_bytes", "num_blocks", "max_model_len", "token_budget", "mixed_budget", "max_running")
    optional: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (*names, "num_speculative_tokens")
        if getattr(settings, name) is not None
    }
    if settings.host_kv_bytes:
        optional["host_kv_bytes"] = settings.host_kv_bytes
    if settings.disk_kv_dir is not None:
        optional |= {"disk_kv_dir": settings.disk_kv_dir, "disk_kv_bytes": settings.disk_kv_bytes}
    return EngineConfig(
        model_dir=settings.model,
        load_format=settings.load_format,
        dtype=settings.dtype,
        device=settings.device,
        block_size=settings.block_size,
        shares_kv_cache=settings.shared_memory,
        device_share=settings.device_share,
        decodes=settings.decodes,
        outbox_bytes=settings.outbox_bytes or 0,
        has_fp8_weights=settings.fp8_weights,
        kv_cache_dtype=settings.kv_cache_dtype,
        **optional,
    )


class _LoadProgress:
    """Logs each tenth of the weights."""

    def __init__(self) -> None:
        self._last_tenth = -1

    def __call__(self, num_done: int, num_total: int) -> None:
        tenth = 10 * num_done // max(1, num_total)
        if tenth > self._last_tenth:
            self._last_tenth = tenth
            log.info("loading_weights", percent=10 * tenth, num_done=num_done, num_total=num_total)
