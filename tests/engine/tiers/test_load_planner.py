from __future__ import annotations

from typing import Any

import pytest

from engine.kv_load import KvLoad
from engine.load_planner import LoadPlanner
from kvstore.block_hash import BlockTier


class Source:
    tier: BlockTier | None = None

    def __init__(self, num_blocks: int, block_s: float, latency_s: float = 0.0) -> None:
        self.num_blocks = num_blocks
        self._block_s = block_s
        self._latency_s = latency_s

    def estimate_s(self, num_blocks: int) -> float:
        return self._latency_s + num_blocks * self._block_s

    def start(self, load: KvLoad) -> Any:
        raise AssertionError("a plan starts nothing")


@pytest.fixture
def planner() -> LoadPlanner:
    """0.01 s to compute a block of 16 tokens."""
    planner = LoadPlanner(16)
    planner.observe_step(160, 0.1)
    return planner


def test_compute_and_source_are_done_at_once(planner: LoadPlanner) -> None:
    assert planner.num_compute_blocks(100, 1.0) == 50
    assert planner.num_compute_blocks(100, 3.0) == 75
    assert planner.num_compute_blocks(100, 1 / 3) == 25


def test_fast_source_needs_no_help(planner: LoadPlanner) -> None:
    assert planner.num_compute_blocks(100, 0.02) == 0
    # Nor is a forward pass worth it for a block or two.
    assert planner.num_compute_blocks(100, 0.07) == 0
    assert planner.num_compute_blocks(100, 0.1) == 9


@pytest.mark.parametrize("num_open", [1, 2, 3, 10])
def test_source_that_never_comes_leaves_everything(planner: LoadPlanner, num_open: int) -> None:
    assert planner.num_compute_blocks(num_open, 1000.0) == num_open


def test_before_anything_was_computed_both_get_half() -> None:
    assert LoadPlanner(16).num_compute_blocks(100, 0.001) == 50
    assert LoadPlanner(16).num_compute_blocks(1, 0.001) == 1
    assert LoadPlanner(16).num_compute_blocks(0, 0.001) == 0


def test_steps_that_only_decode_say_nothing_about_prefill(planner: LoadPlanner) -> None:
    planner.observe_step(0, 5.0)
    planner.observe_step(3, 5.0)
    assert planner.compute_s(1) == pytest.approx(0.01)


def test_recent_steps_count_more(planner: LoadPlanner) -> None:
    for _ in range(50):
        planner.observe_step(160, 0.2)
    assert planner.compute_s(1) == pytest.approx(0.02, rel=0.02)


def test_the_source_with_the_earliest_end_is_chosen(planner: LoadPlanner) -> None:
    fast_but_short, long = Source(30, 0.0001), Source(100, 0.001)
    assert planner.choose([fast_but_short, long], 0, 100) is long
    assert planner.choose([Source(99, 0.0001), long], 0, 100) is not long
    assert planner.choose([Source(100, 0.002), long], 0, 100) is long


def test_source_without_anything_new_or_slower_than_compute_is_not_used(planner: LoadPlanner) -> None:
    assert planner.choose([Source(10, 0.0001)], 10, 100) is None
    assert planner.choose([Source(12, 0.0001, latency_s=0.5)], 10, 12) is None
    assert planner.choose([], 0, 100) is None
    cold = LoadPlanner(16)
    peer = Source(12, 0.0001, latency_s=0.5)
    assert cold.choose([peer], 10, 12) is peer
