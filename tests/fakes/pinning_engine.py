"""An engine whose pins are of its device blocks only: what a holder of fetched blocks needs of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from engine.engine import Engine
from engine.kv_cache import KvCache
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceStatus
from kvstore.block_hash import BlockHash
from tests.fakes.fake_model import FakeModel, build_fake_engine


@dataclass
class DevicePinnedRun:
    pin_id: int
    block_ids: list[int]
    kv_cache: KvCache
    hides_device: bool  # as if the blocks were in host memory

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    def read_blocks(self, start: int, stop: int) -> memoryview:
        layout = self.kv_cache.layout
        return self.kv_cache.read_blocks(0, layout.num_layers, self.block_ids[start:stop])

    def is_on_device(self, start: int, stop: int) -> list[int] | None:
        return None if self.hides_device else self.block_ids[start:stop]


class PinningEngine(Engine):
    """A pin is a sequence that only keeps its blocks: the pool's books include it."""

    hides_device = False
    run_type: type[DevicePinnedRun] = DevicePinnedRun
    _pin_ids: itertools.count[int]

    @property
    def num_pins(self) -> int:
        return sum(seq_id < 0 for seq_id in self._seqs)

    def pin(self, hashes: list[BlockHash]) -> DevicePinnedRun:
        pin_id = next(self._pin_ids)
        block_ids = self._pool.lookup(hashes)
        self._pool.acquire(block_ids)
        seq = Sequence(-pin_id, [1], SamplingParams())
        seq.status, seq.block_table = SequenceStatus.KEPT, block_ids
        self._seqs[-pin_id] = self._scheduler.kept[-pin_id] = seq
        return self.run_type(pin_id, list(block_ids), self.kv_cache, self.hides_device)

    def unpin(self, pin_id: int) -> None:
        self.abort(-pin_id)


def build_pinning_engine(
    *,
    hides_device: bool = False,
    run_type: type[DevicePinnedRun] = DevicePinnedRun,
    model: FakeModel | None = None,
    num_blocks: int = 64,
    is_shared: bool = False,
) -> PinningEngine:
    engine = build_fake_engine(model=model, num_blocks=num_blocks, is_shared=is_shared)
    engine.__class__ = PinningEngine
    assert isinstance(engine, PinningEngine)
    engine.hides_device, engine.run_type, engine._pin_ids = hides_device, run_type, itertools.count(1)
    return engine
