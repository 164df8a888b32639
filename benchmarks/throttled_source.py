"""A place of known speed that holds a prefix: what a peer behind a network of that speed is to the engine."""

from __future__ import annotations

import threading
import time

from engine.kv_cache import KvCache
from engine.kv_load import KvLoad
from kvstore.block_hash import BlockTier

_CLAIM_BLOCKS = 8


class ThrottledSource:
    """A KvSource. Used once; join() when its sequence has ended."""

    tier: BlockTier | None = None

    def __init__(self, blocks: list[memoryview], kv_cache: KvCache, bytes_per_s: float) -> None:
        """blocks: contents of the leading blocks; kv_cache: where they go."""
        self.num_blocks = len(blocks)
        self._blocks = blocks
        self._kv_cache = kv_cache
        self._block_s = kv_cache.layout.block_bytes / bytes_per_s
        self._thread: threading.Thread | None = None

    def estimate_s(self, num_blocks: int) -> float:
        return num_blocks * self._block_s

    def start(self, load: KvLoad) -> None:
        self._thread = threading.Thread(target=self._run, args=(load,))
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, load: KvLoad) -> None:
        back, due = load.end_block, time.monotonic()
        while claimed := load.claim(max(load.first_block, back - _CLAIM_BLOCKS)):
            due += len(claimed) * self._block_s
            time.sleep(max(0.0, due - time.monotonic()))
            for block, block_id in zip(claimed, load.block_ids(claimed), strict=True):
                layers = self._kv_cache.layout.num_layers
                self._kv_cache.write_blocks(0, layers, [block_id], self._blocks[block])
            load.complete(claimed)
            back = claimed.start
