"""An engine whose pins a test can watch, hold up and hide: what a holder of fetched blocks needs of it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.engine import Engine
from engine.pins import PinnedRun
from kvstore.block_hash import BlockHash
from tests.fakes.fake_model import FakeModel, build_fake_engine


@dataclass
class WatchedRun:
    """The engine's own run, behind methods that a test may override."""

    run: PinnedRun
    hides_device: bool  # as if the blocks were in host memory

    @property
    def pin_id(self) -> int:
        return self.run.pin_id

    @property
    def num_blocks(self) -> int:
        return self.run.num_blocks

    def read_blocks(self, start: int, stop: int) -> memoryview:
        return self.run.read_blocks(start, stop)

    def is_on_device(self, start: int, stop: int) -> list[int] | None:
        return None if self.hides_device else self.run.is_on_device(start, stop)

    def host_slots(self, start: int, stop: int) -> list[int] | None:
        return self.run.host_slots(start, stop)


class PinningEngine(Engine):
    hides_device = False
    run_type: type[WatchedRun] = WatchedRun

    @property
    def num_pins(self) -> int:
        return len(self._pins._runs)

    def pin(self, hashes: list[BlockHash]) -> WatchedRun:  # type: ignore[override]
        return self.run_type(super().pin(hashes), self.hides_device)


def build_pinning_engine(
    *,
    hides_device: bool = False,
    run_type: type[WatchedRun] = WatchedRun,
    model: FakeModel | None = None,
    num_blocks: int = 64,
    is_shared: bool = False,
) -> PinningEngine:
    engine = build_fake_engine(model=model, num_blocks=num_blocks, is_shared=is_shared)
    engine.__class__ = PinningEngine
    assert isinstance(engine, PinningEngine)
    engine.hides_device, engine.run_type = hides_device, run_type
    return engine
