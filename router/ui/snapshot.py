"""The state of the system as the page gets it, about once a second."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import orjson

from kvstore.worker_record import WorkerRecord
from router.drain import Drain
from router.fleet import Fleet
from router.link import Link
from router.model_metrics import ModelMetrics
from router.ui.latency import LatencyWindow
from router.ui.worker_states import WorkerStateReader

_MAX_WORKERS = 256
_MAX_LEGS = 256
_HISTORY = 300  # looks


class Snapshots:
    """Of one model; made one after the other, for all viewers together."""

    def __init__(self, fleet: Fleet, drain: Drain, metrics: ModelMetrics, about: dict[str, Any]) -> None:
        """`about`: what never changes."""
        self.reader = WorkerStateReader(lambda: [record for record, _ in fleet.workers()[:_MAX_WORKERS]])
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._fleet = fleet
        self._drain = drain
        self._metrics = metrics
        self._about = about
        self._window = LatencyWindow(metrics.activity, metrics.itl)
        self._expert_round = 0

    def start(self) -> None:
        """Before the first of a series: what happened unseen is forgotten."""
        self._metrics.activity.is_watched = True
        self._metrics.activity.take()
        self._window = LatencyWindow(self._metrics.activity, self._metrics.itl)

    def stop(self) -> None:
        self._metrics.activity.is_watched = False
        self._metrics.activity.take()

    def opening(self) -> bytes:
        """For a viewer who just came."""
        experts = self.reader.states.experts
        return _event("opening", {**self._about, "history": list(self.history), "experts": experts})

    def next(self) -> bytes:
        legs = self._window.look()
        point = {"time": round(time.time(), 1), **_rounded(self._window.percentiles())}
        self.history.append(point)
        workers = self._fleet.workers()
        state: dict[str, Any] = {
            "is_ready": self._fleet.is_ready,
            "is_draining": self._drain.is_draining,
            "num_in_flight": _gauge_value(self._metrics),
            "rates": {name: round(rate, 3) for name, rate in self._window.rates().items()},
            "latency": point,
            "num_workers": len(workers),
            "workers": [self._worker(record, link) for record, link in workers[:_MAX_WORKERS]],
            "legs": [
                {
                    "prefill": prefill_id,
                    "decode": decode_id,
                    "num_sequences": leg.num_sequences,
                    "num_hit_tokens": leg.num_hit_tokens,
                    "num_prompt_tokens": leg.num_prompt_tokens,
                    "bytes": leg.transfer_bytes,
                }
                for (prefill_id, decode_id), leg in list(legs.items())[:_MAX_LEGS]
            ],
        }
        if self.reader.states.num_rounds != self._expert_round:
            self._expert_round = self.reader.states.num_rounds
            state["experts"] = self.reader.states.experts
        return _event("state", state)

    def _worker(self, record: WorkerRecord, link: Link | None) -> dict[str, Any]:
        load = record.load
        return {
            "id": record.worker_id,
            "role": record.role,
            "group": record.group_id,
            "ep_rank": record.ep_rank,
            "ep_size": record.ep_size,
            "status": self._status(record, link),
            "num_running": load.num_running,
            "num_waiting": load.num_waiting,
            "num_waiting_tokens": load.num_waiting_tokens,
            "block_size": record.block_size,
            "tiers": self.reader.states.tiers.get(record.worker_id) or _device_tier(record, load),
            "prefill_tokens_per_s": round(record.load.prefill_tokens_per_s, 1),
        }

    def _status(self, record: WorkerRecord, link: Link | None) -> str:
        if record.is_draining:
            return "draining"
        if record.role == "decode":
            return "ready" if link is not None and link.is_up else "unlinked"
        return "suspected" if self._fleet.is_suspected(record) else "ready"


def _device_tier(record: WorkerRecord, load: Any) -> dict[str, dict[str, int]]:
    """Until the worker's own page was read: free and cached blocks are one number in the registry."""
    used = max(0, record.num_blocks - load.num_free_blocks)
    return {"device": {"total": record.num_blocks, "used": used, "cached": 0}}


def _rounded(latencies: dict[str, tuple[float, float] | None]) -> dict[str, list[float] | None]:
    return {
        name: None if pair is None else [round(value, 5) for value in pair]
        for name, pair in latencies.items()
    }


def _gauge_value(metrics: ModelMetrics) -> int:
    [family] = metrics.in_flight.collect()
    return int(family.samples[0].value)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
