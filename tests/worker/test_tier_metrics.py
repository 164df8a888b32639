from __future__ import annotations

from prometheus_client import CollectorRegistry

from engine.outputs import LoadOutcome, LoadStats, TierStats
from kvstore.block_hash import BlockTier
from kvstore.worker_record import KvRate
from worker.tier_metrics import TierMetrics


def test_tiers_and_loads_are_told_apart() -> None:
    registry = CollectorRegistry()
    metrics = TierMetrics(registry)

    def tier(name: BlockTier, num_lost: int) -> TierStats:
        return TierStats(
            tier=name,
            num_free_blocks=5,
            num_cached_blocks=3 + name,
            num_used_blocks=1,
            block_bytes=100,
            num_lost_blocks=num_lost,
            load_bytes_per_s=5e8 if name is BlockTier.DISK else 0.0,
            load_latency_s=0.002,
        )

    load = LoadStats(tier=BlockTier.DISK, outcome=LoadOutcome.MET, num_blocks=7, load_s=0.5)
    fetch = LoadStats(tier=None, outcome=LoadOutcome.FAILED, num_blocks=0, load_s=0.1)
    metrics.observe([tier(BlockTier.HOST, 2), tier(BlockTier.DISK, 2)], [load, load, fetch])
    metrics.observe([tier(BlockTier.HOST, 5), tier(BlockTier.DISK, 5)], [])

    assert metrics.kv_rates() == {"disk": KvRate(bytes_per_s=5e8, latency_s=0.002)}
    assert metrics.blocks == {
        "host": {"total": 10, "used": 1, "cached": 4},
        "disk": {"total": 11, "used": 1, "cached": 5},
    }

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"baton_engine_{name}", labels)

    assert value("tier_blocks", tier="host", state="cached") == 4
    assert value("tier_blocks", tier="disk", state="free") == 5
    assert value("tier_bytes", tier="disk") == 600
    assert value("tier_lost_blocks_total") == 5
    assert value("loads_total", source="disk", outcome="met") == 2
    assert value("loads_total", source="peer", outcome="failed") == 1
    assert value("loaded_blocks_total", source="disk") == 14
    assert value("load_seconds_sum", source="disk") == 1.0
