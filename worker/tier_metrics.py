"""baton_engine_tier_* and baton_engine_load*: what is kept below the device, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.outputs import LoadStats, TierStats
from kvstore.block_hash import BlockTier
from kvstore.worker_record import KvPath, KvRate
from servicekit.metrics import SECONDS_BUCKETS


class TierMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._blocks = Gauge(
            "baton_engine_tier_blocks",
            "KV blocks that fit in host memory or on disk, by state: free, cached, used",
            ["tier", "state"],
            registry=registry,
        )
        self._bytes = Gauge(
            "baton_engine_tier_bytes", "KV kept in host memory or on disk", ["tier"], registry=registry
        )
        self._lost = Counter(
            "baton_engine_tier_lost_blocks",
            "KV blocks that left the device or host memory before they were saved below, or could not be",
            registry=registry,
        )
        self._num_lost = 0
        self._rates: dict[KvPath, KvRate] = {}
        self.blocks: dict[str, dict[str, int]] = {}  # by tier; replaced as a whole, so any thread may read
        self._loads = Counter(
            "baton_engine_loads",
            "loads of cached prefixes, by where from and how they ended",
            ["source", "outcome"],
            registry=registry,
        )
        self._loaded_blocks = Counter(
            "baton_engine_loaded_blocks", "KV blocks that loads brought", ["source"], registry=registry
        )
        self._load_seconds = Histogram(
            "baton_engine_load_seconds",
            "one load of a cached prefix, from its start until compute has met it",
            ["source"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    def observe(self, tiers: Sequence[TierStats], loads: Sequence[LoadStats]) -> None:
        for stats in tiers:
            name = stats.tier.name.lower()
            self._blocks.labels(name, "free").set(stats.num_free_blocks)
            self._blocks.labels(name, "cached").set(stats.num_cached_blocks)
            self._blocks.labels(name, "used").set(stats.num_used_blocks)
            num_held = stats.num_cached_blocks + stats.num_used_blocks
            self._bytes.labels(name).set(num_held * stats.block_bytes)
        self.blocks = {stats.tier.name.lower(): _counts(stats) for stats in tiers}
        self._rates = {
            cast(KvPath, stats.tier.name.lower()): KvRate(
                bytes_per_s=stats.load_bytes_per_s, latency_s=stats.load_latency_s
            )
            for stats in tiers
            if stats.load_bytes_per_s
        }
        if tiers:
            self._lost.inc(tiers[0].num_lost_blocks - self._num_lost)
            self._num_lost = tiers[0].num_lost_blocks
        for load in loads:
            source = source_name(load.tier)
            self._loads.labels(source, load.outcome.value).inc()
            self._loaded_blocks.labels(source).inc(load.num_blocks)
            self._load_seconds.labels(source).observe(load.load_s)

    def kv_rates(self) -> dict[KvPath, KvRate]:
        """For the registry: how fast blocks come from the tiers that something was loaded from."""
        return self._rates


def _counts(stats: TierStats) -> dict[str, int]:
    num_held = stats.num_cached_blocks + stats.num_used_blocks
    return {
        "total": stats.num_free_blocks + num_held,
        "used": stats.num_used_blocks,
        "cached": stats.num_cached_blocks,
    }


def source_name(tier: BlockTier | None) -> str:
    return "peer" if tier is None else tier.name.lower()
