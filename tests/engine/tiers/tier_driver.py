"""Engines with lower tiers, run until nothing is left to do, with sources that a test controls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.engine import Engine
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.kv_load import KvLoad, KvSource
from engine.load_planner import LoadPlanner
from engine.outputs import LoadStats, SequenceOutput, StepOutput
from engine.tiers.block_directory import BlockDirectory
from engine.tiers.disk_tier import DiskTier
from engine.tiers.host_tier import HostTier
from engine.tiers.tier_store import LowerTiers
from kvstore.block_hash import BlockHash, BlockTier
from tests.fakes.fake_model import fake_kv_layout

TIMEOUT_S = 20.0


def lower_tiers(
    num_slots: int = 0,
    directory: Path | None = None,
    num_files: int = 64,
    layout: KvLayout | None = None,
) -> LowerTiers:
    """num_slots 0 with a directory: host memory is only the way there."""
    layout = layout or fake_kv_layout()
    disk = None
    if directory is not None:
        block_directory = BlockDirectory(directory, layout)
        disk = DiskTier(block_directory, num_files * block_directory.file_bytes)
    is_staging = directory is not None and not num_slots
    return LowerTiers(host=HostTier(layout, num_slots or 16), disk=disk, is_host_staging=is_staging)


class Driver:
    """Steps an engine as its thread would: while there is work, and when somebody says that there is."""

    def __init__(self, engine: Engine, num_compute_blocks: int | None = None) -> None:
        """num_compute_blocks: of a load, at a time; None: as the planner says."""
        self.engine = engine
        if num_compute_blocks is not None:
            engine._scheduler.loads.planner = FixedPlanner(num_compute_blocks)
        self.steps: list[StepOutput] = []
        self.tokens: dict[int, list[int]] = {}
        self.outputs: dict[int, SequenceOutput] = {}  # the first of each sequence
        self.tier_of: dict[BlockHash, BlockTier] = {}  # what the events add up to
        self._news = threading.Event()
        engine.subscribe(self._news.set)

    def step(self) -> StepOutput:
        step = self.engine.step()
        self.engine.check_integrity()
        self.steps.append(step)
        for output in step.outputs:
            self.tokens.setdefault(output.seq_id, []).extend(output.token_ids)
            self.outputs.setdefault(output.seq_id, output)
        for block_hash in step.block_events.removed:
            del self.tier_of[block_hash]
        self.tier_of.update(step.block_events.placed)
        return step

    def until(self, is_reached: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + TIMEOUT_S
        while not is_reached():
            self._news.clear()
            if self.engine.has_work:
                self.step()
                continue
            wait_s = self.engine.next_work_s
            self._news.wait(0.5 if wait_s is None else min(wait_s, 0.5))
            assert time.monotonic() < ends_at, "nothing happens any more"

    def until_done(self) -> None:
        """No sequence is left and every block is where it goes."""
        engine = self.engine
        self.until(
            lambda: not engine._seqs and engine._tiers.is_idle and not engine.has_work and not self._held()
        )

    def _held(self) -> list[int]:
        return list(self.engine._scheduler.loads.held_ids())

    @property
    def loads(self) -> list[LoadStats]:
        return [load for step in self.steps for load in step.stats.loads]

    @property
    def num_prefilled(self) -> int:
        return sum(step.stats.num_prefill_tokens for step in self.steps)


class FixedPlanner(LoadPlanner):
    """Loads whenever a source has anything; compute takes so many blocks at a time."""

    def __init__(self, num_compute_blocks: int) -> None:
        super().__init__(block_size=4)
        self._num_compute_blocks = num_compute_blocks

    def choose(self, sources: Iterable[KvSource], first_block: int, end_block: int) -> KvSource | None:
        return max(
            (source for source in sources if min(source.num_blocks, end_block) > first_block),
            key=lambda source: source.num_blocks,
            default=None,
        )

    def num_compute_blocks(self, num_open: int, remaining_s: float) -> int:
        return min(num_open, self._num_compute_blocks)


class PeerOf:
    """A source over another engine's cache that writes when and as far as it is told to."""

    tier: BlockTier | None = None

    def __init__(
        self,
        holder: KvCache,
        block_ids: list[int],
        *,
        block_s: float = 0.0,
        stride: int = 1,
        fails_after: int | None = None,
        has_blocks: int | None = None,
        starts: threading.Event | None = None,
    ) -> None:
        """block_s: seconds for each block, though it promises to take none; fails_after: so many blocks;
        has_blocks: fewer than it says; starts: nothing happens before."""
        self.num_blocks = len(block_ids)
        self.num_written = 0
        self._holder = holder
        self._block_ids = block_ids
        self._block_s = block_s
        self._stride = stride
        self._fails_after = fails_after
        self._has_blocks = has_blocks
        self._starts = starts
        self._target: KvCache | None = None
        self.thread: threading.Thread | None = None

    def into(self, target: KvCache) -> PeerOf:
        self._target = target
        return self

    def estimate_s(self, num_blocks: int) -> float:
        return num_blocks * 1e-9

    def start(self, load: KvLoad) -> None:
        self.thread = threading.Thread(target=self._run, args=(load,))
        self.thread.start()

    def _run(self, load: KvLoad) -> None:
        assert self._target is not None
        assert self._starts is None or self._starts.wait(TIMEOUT_S)
        if self._has_blocks is not None:
            load.shorten(self._has_blocks)
        back = load.end_block
        while True:
            if self._fails_after is not None and self.num_written >= self._fails_after:
                claimed = load.claim(max(load.first_block, back - self._stride))
                time.sleep(self._block_s)
                load.fail("as the test wants it" if claimed else "too late")
                return
            claimed = load.claim(max(load.first_block, back - self._stride))
            if not claimed:
                return
            time.sleep(self._block_s * len(claimed))
            layers = self._holder.layout.num_layers
            payload = self._holder.read_blocks(0, layers, self._block_ids[claimed.start : claimed.stop])
            self._target.write_blocks(0, layers, load.block_ids(claimed), payload)
            self.num_written += len(claimed)
            load.complete(claimed)
            back = claimed.start
