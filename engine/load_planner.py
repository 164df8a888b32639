"""Load, compute, or both: what brings a cached prefix here soonest, from measured rates.

With c seconds to compute a block and l to load one, n blocks are there soonest when compute takes
n * l / (c + l) of them and the source the rest: both are done at once. What that comes to decides: less than
is worth a forward pass is "load", all of them is "compute". Asked again before each chunk, with the time that
the rest is now expected to take: a source that falls behind gets less.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.kv_load import KvSource

_DECAY = 0.9  # of older steps
_MIN_CHUNK_TOKENS = 128  # a forward pass of fewer saves less than it may cost


class LoadPlanner:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._min_blocks = max(1, _MIN_CHUNK_TOKENS // block_size)
        self._seconds = 0.0
        self._num_tokens = 0.0

    def observe_step(self, num_prefill_tokens: int, step_s: float) -> None:
        """Steps with decodes count as they are: a prompt that is computed beside them is that slow."""
        if num_prefill_tokens >= self._block_size:
            self._seconds = self._seconds * _DECAY + step_s
            self._num_tokens = self._num_tokens * _DECAY + num_prefill_tokens

    def compute_s(self, num_blocks: int) -> float | None:
        """Seconds to compute so many; None before the first prompt was computed."""
        if not self._num_tokens:
            return None
        return num_blocks * self._block_size * self._seconds / self._num_tokens

    def choose(self, sources: Iterable[KvSource], first_block: int, end_block: int) -> KvSource | None:
        """The source with which [first_block, end_block) is there first; None: computing is as fast."""
        best, best_s = None, self.compute_s(end_block - first_block)
        for source in sources:
            num_blocks = min(source.num_blocks, end_block) - first_block
            if num_blocks <= 0:
                continue
            seconds = self._duration_s(source, num_blocks, end_block - first_block - num_blocks)
            if best_s is None or seconds < best_s:
                best, best_s = source, seconds
        return best

    def num_compute_blocks(self, num_open: int, remaining_s: float) -> int:
        """How many of num_open blocks compute should take now, when the source needs remaining_s for all of
        them. 0: the rest is there sooner than a forward pass."""
        if not num_open:
            return 0
        block_s = self.compute_s(1)
        if block_s is None:
            return max(1, num_open // 2)
        share = round(remaining_s / (block_s + remaining_s / num_open))
        return share if share >= min(self._min_blocks, num_open) else 0

    def _duration_s(self, source: KvSource, num_blocks: int, num_behind: int) -> float:
        """Until num_blocks are loaded or computed, and num_behind after them computed."""
        load_s = source.estimate_s(num_blocks)
        num_computed = self.num_compute_blocks(num_blocks, load_s)
        compute_s, behind_s = self.compute_s(num_computed), self.compute_s(num_behind)
        if compute_s is None or behind_s is None:
            return load_s / num_blocks  # nothing to compare with but each other
        # A chunk of its own in front is a forward pass more.
        extra_s = self.compute_s(self._min_blocks) if num_computed else 0.0
        assert extra_s is not None
        return max(compute_s, source.estimate_s(num_blocks - num_computed)) + behind_s + extra_s
