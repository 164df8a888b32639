"""/state of a worker: too much for Prometheus and for the registry, read only while somebody looks."""

from __future__ import annotations

from typing import Any

from worker.engine_metrics import EngineMetrics

_MAX_CELLS = 1 << 16  # layers times experts; a model with more shows no experts


class StatePage:
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def __call__(self) -> dict[str, Any]:
        """JSON values. Blocks by tier and state, and tokens by [moe layer][logical expert]."""
        experts = self._metrics.experts.recent_loads()
        num_cells = sum(map(len, experts))
        return {
            "tiers": {"device": self._metrics.device_blocks, **self._metrics.tiers.blocks},
            "experts": experts if num_cells <= _MAX_CELLS else [],
        }
