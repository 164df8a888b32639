from __future__ import annotations

import queue
import threading
from pathlib import Path

from engine.engine import Engine
from engine.engine_thread import EngineThread
from engine.outputs import SequenceOutput
from engine.sequence import Sequence
from engine.tiers.block_directory import BlockDirectory
from tests.engine.core.engine_driver import generate, greedy
from tests.engine.tiers.tier_driver import FixedPlanner, PeerOf, lower_tiers
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(51)]  # 12 full blocks of 4


class Running:
    def __init__(self, engine: Engine) -> None:
        self.outputs: queue.Queue[SequenceOutput] = queue.Queue()
        self.num_steps = 0
        self.thread = EngineThread(engine, self._on_step, self._on_failure)
        self.failure: BaseException | None = None
        self.thread.start()

    def _on_step(self, step) -> None:  # type: ignore[no-untyped-def]
        self.num_steps += 1
        for output in step.outputs:
            self.outputs.put(output)

    def _on_failure(self, error: BaseException) -> None:
        self.failure = error

    def ask(self, seq: Sequence) -> SequenceOutput:
        self.thread.call(lambda engine: engine.add(seq)).result(10)
        return self.outputs.get(timeout=20)


def _peer(holder: Engine, target: Engine, **behaviour: object) -> PeerOf:
    generate(holder, [PROMPT], 1)
    block_ids = holder._pool.lookup(holder.hash_chain.hashes(PROMPT))
    return PeerOf(holder.kv_cache, block_ids, **behaviour).into(target.kv_cache)  # type: ignore[arg-type]


def test_thread_sleeps_until_the_source_has_everything() -> None:
    engine = build_fake_engine()
    engine._scheduler.loads.planner = FixedPlanner(0)
    source = _peer(build_fake_engine(), engine, block_s=0.01)
    running = Running(engine)
    output = running.ask(Sequence(1, PROMPT, greedy(1), kv_source=source))
    assert output.token_ids == tuple(expected_tokens(PROMPT, 1))
    assert output.num_fetched_tokens == 48
    # Woken a few times to look at the plan, not once for each block, and never in a loop.
    assert running.num_steps < 100
    assert running.thread.stop() and running.failure is None


def test_thread_wakes_by_itself_when_a_source_says_nothing() -> None:
    engine = build_fake_engine()
    generate(engine, [[5] * 30], 4, first_id=90)  # the planner knows how fast compute is
    starts = threading.Event()
    source = _peer(build_fake_engine(), engine, starts=starts)
    running = Running(engine)
    output = running.ask(Sequence(1, PROMPT, greedy(1), kv_source=source))
    assert output.token_ids == tuple(expected_tokens(PROMPT, 1))
    assert output.num_fetched_tokens == 0
    starts.set()
    assert running.thread.stop() and running.failure is None
    assert source.thread is not None
    source.thread.join(10)


def test_stop_in_the_middle_of_a_load_ends_the_threads_and_frees_the_directory(tmp_path: Path) -> None:
    for _ in range(5):
        engine = build_fake_engine(num_blocks=24, tiers=lower_tiers(32, tmp_path))
        engine._scheduler.loads.planner = FixedPlanner(0)
        running = Running(engine)
        running.ask(Sequence(1, PROMPT, greedy(1)))
        running.ask(Sequence(2, [9] * 80, greedy(1)))
        running.thread.call(lambda engine: engine.add(Sequence(3, PROMPT, greedy(1))))
        assert running.thread.stop() and running.failure is None
        assert not [t for t in threading.enumerate() if t.name.startswith("kv-")]
        BlockDirectory(tmp_path, fake_kv_layout()).close()
