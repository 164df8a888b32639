"""From the configuration to the tiers below the device."""

from __future__ import annotations

import torch

from engine.engine_config import EngineConfig, EngineConfigError
from engine.kv_layout import KvLayout
from engine.memory import available_memory_bytes
from engine.tiers.block_directory import BlockDirectory
from engine.tiers.disk_tier import DiskTier
from engine.tiers.host_tier import HostTier
from engine.tiers.tier_store import LowerTiers

_STAGING_BYTES = 64 << 20  # of host memory on the way to a disk, where nobody asked for a host tier
_MIN_STAGING_BLOCKS = 16


def build_lower_tiers(config: EngineConfig, layout: KvLayout) -> LowerTiers:
    """EngineConfigError, one line, for what cannot work here. The caller closes an engine that has a disk
    tier, so that another one may have the directory."""
    has_disk = config.disk_kv_dir is not None and config.disk_kv_bytes > 0
    num_slots = _num_host_slots(config, layout)
    is_staging = has_disk and num_slots == 0
    if is_staging:
        num_slots = max(_MIN_STAGING_BLOCKS, _STAGING_BYTES // layout.block_bytes)
    disk = _open_disk(config, layout) if has_disk else None
    if not num_slots:
        return LowerTiers()
    is_pinned = torch.device(config.device).type == "cuda"
    return LowerTiers(
        host=HostTier(layout, num_slots, is_pinned=is_pinned), disk=disk, is_host_staging=is_staging
    )


def _num_host_slots(config: EngineConfig, layout: KvLayout) -> int:
    if config.host_kv_bytes <= 0:
        return 0
    available = available_memory_bytes("cpu")
    if config.host_kv_bytes > available:
        raise EngineConfigError(
            f"host_kv_bytes is {config.host_kv_bytes / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB of memory are free"
        )
    num_slots = config.host_kv_bytes // layout.block_bytes
    if num_slots < 1:
        raise EngineConfigError(
            f"host_kv_bytes is {config.host_kv_bytes}, one KV block takes {layout.block_bytes} bytes"
        )
    return num_slots


def _open_disk(config: EngineConfig, layout: KvLayout) -> DiskTier:
    assert config.disk_kv_dir is not None
    directory = None
    try:
        directory = BlockDirectory(config.disk_kv_dir, layout)
        return DiskTier(directory, config.disk_kv_bytes)
    except ValueError as error:
        if directory is not None:
            directory.close()
        raise EngineConfigError(str(error)) from error
