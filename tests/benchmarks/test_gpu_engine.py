"""benchmarks.gpu_engine: how many experts and tokens a step touches is counted, in small on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_engine import ClosedLoop
from benchmarks.gpu_shape import write_shape
from benchmarks.gpu_topologies import TINY
from engine.build import build_engine
from engine.engine import Engine
from engine.engine_config import EngineConfig

NUM_CHOSEN, NUM_EXPERTS = 2, 8


def engine_with(directory: Path, spread: str) -> Engine:
    shape = {**TINY.shape, "num_experts_per_tok": NUM_CHOSEN, "baton_dummy_spread": spread}
    return build_engine(
        EngineConfig(
            model_dir=write_shape(directory, **shape),
            load_format="dummy",
            dtype="float32",
            num_blocks=64,
            max_model_len=128,
            max_running=16,
            token_budget=128,
        )
    )


@pytest.mark.parametrize("spread", ["variance", "uniform"])
def test_a_step_of_many_tokens_touches_more_experts_than_one_of_one(tmp_path: Path, spread: str) -> None:
    loop = ClosedLoop(engine_with(tmp_path, spread))
    alone, beside_others = loop.count(1, 8, 32), loop.count(12, 8, 32)
    assert (alone.experts, alone.tokens) == (NUM_CHOSEN, 1)
    assert beside_others.experts is not None
    assert NUM_CHOSEN < beside_others.experts <= NUM_EXPERTS
    assert 1 < beside_others.tokens <= 12


def test_with_tied_weights_all_tokens_touch_the_same_experts(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, "tied")
    touched = ClosedLoop(engine).count(12, 8, 32)
    assert touched.experts == NUM_CHOSEN
    assert touched.tokens > 1
    assert not engine.has_work
