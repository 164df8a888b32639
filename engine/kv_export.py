"""How the cache of one process is opened by another one that copies blocks from it itself.

On a device it is opened by CUDA IPC. On the CPU the shared memory file stands in for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda_ipc import MemoryHandle

STAMP_BYTES = 16  # behind the blocks of a cache on a device; the name of its export, once it has one


@dataclass(frozen=True, slots=True, kw_only=True)
class KvExport:
    """What the opener is told."""

    name: str  # of this cache in this process: hex digits of its stamp, never the same twice
    pid: int  # the owner: dead, its cache is of no use
    num_blocks: int
    memory: MemoryHandle  # without a device: the handle is the name of the shared file
