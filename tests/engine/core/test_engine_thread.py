from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from engine.engine import Engine
from engine.engine_thread import EngineStopped, EngineThread
from engine.outputs import StepOutput
from engine.sequence import Sequence
from tests.engine.core.engine_driver import greedy
from tests.fakes.fake_model import FakeModel, build_fake_engine, expected_tokens


class Recorder:
    """Collects tokens until an expected number is there."""

    def __init__(self, num_expected: int) -> None:
        self.tokens: list[int] = []
        self.failures: list[BaseException] = []
        self.has_all = threading.Event()
        self.has_failed = threading.Event()
        self.thread_names: set[str] = set()
        self._num_expected = num_expected

    def on_step(self, step: StepOutput) -> None:
        self.thread_names.add(threading.current_thread().name)
        self.tokens += [token for output in step.outputs for token in output.token_ids]
        if len(self.tokens) >= self._num_expected:
            self.has_all.set()

    def on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.has_failed.set()


class FailingModel(FakeModel):
    def forward(self, *args: Any, **wanted: Any) -> Any:
        raise RuntimeError("the kernel is gone")


def start(engine: Engine, recorder: Recorder) -> EngineThread:
    thread = EngineThread(engine, recorder.on_step, recorder.on_failure)
    thread.start()
    return thread


def test_a_sequence_added_to_a_sleeping_thread_is_run() -> None:
    recorder = Recorder(10)
    thread = start(build_fake_engine(), recorder)
    thread.call(lambda engine: engine.add(Sequence(1, [1, 2, 3], greedy(10)))).result(10)
    assert recorder.has_all.wait(10)
    assert recorder.tokens == expected_tokens([1, 2, 3], 10)
    assert recorder.thread_names == {"engine"}
    assert thread.stop()
    assert not recorder.failures


def test_the_result_and_the_error_of_a_command_belong_to_its_caller() -> None:
    recorder = Recorder(0)
    thread = start(build_fake_engine(), recorder)
    assert thread.call(lambda engine: engine.num_blocks).result(10) == 64
    with pytest.raises(ValueError, match="empty"):
        thread.call(lambda engine: engine.add(Sequence(1, [], greedy(1)))).result(10)
    assert thread.call(lambda engine: engine.has_work).result(10) is False
    assert thread.stop()
    assert not recorder.failures


def test_a_sleeping_thread_takes_no_steps() -> None:
    model = FakeModel()
    recorder = Recorder(3)
    thread = start(build_fake_engine(model=model), recorder)
    thread.call(lambda engine: engine.add(Sequence(1, [1], greedy(3)))).result(10)
    assert recorder.has_all.wait(10)
    for _ in range(5):
        thread.call(lambda engine: None).result(10)
    assert model.num_forwards == 3
    assert thread.stop()


def test_a_failed_step_is_reported_once_and_everything_later_fails() -> None:
    recorder = Recorder(0)
    thread = start(build_fake_engine(model=FailingModel()), recorder)
    thread.call(lambda engine: engine.add(Sequence(1, [1], greedy(3)))).result(10)
    assert recorder.has_failed.wait(10)
    with pytest.raises(EngineStopped) as caught:
        thread.call(lambda engine: engine.load()).result(10)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert thread.stop()
    assert [str(error) for error in recorder.failures] == ["the kernel is gone"]


def test_an_error_of_the_step_callback_is_a_failure() -> None:
    failures: list[BaseException] = []
    has_failed = threading.Event()

    def fail(step: StepOutput) -> None:
        raise KeyError("sink")

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        has_failed.set()

    thread = EngineThread(build_fake_engine(), fail, on_failure)
    thread.start()
    thread.call(lambda engine: engine.add(Sequence(1, [1], greedy(3)))).result(10)
    assert has_failed.wait(10)
    assert isinstance(failures[0], KeyError)
    assert thread.stop()


def test_stop_drops_what_runs_and_refuses_what_comes() -> None:
    engine = build_fake_engine(num_blocks=4096)
    recorder = Recorder(1)
    thread = start(engine, recorder)
    thread.call(lambda engine: engine.add(Sequence(1, [1], greedy(10_000)))).result(10)
    assert recorder.has_all.wait(10)
    assert thread.stop()
    assert thread.stop()
    assert engine.load().num_used_blocks == 0
    with pytest.raises(EngineStopped):
        thread.call(lambda engine: None).result(10)
    assert not recorder.failures


def test_commands_run_in_order_and_a_cancelled_one_does_not_run() -> None:
    recorder = Recorder(0)
    thread = start(build_fake_engine(), recorder)
    may_go_on = threading.Event()
    order: list[int] = []
    blocker = thread.call(lambda engine: may_go_on.wait(10))
    futures: list[Future[None]] = [thread.call(lambda engine, i=i: order.append(i)) for i in range(5)]  # type: ignore[misc]
    assert futures[2].cancel()
    may_go_on.set()
    assert blocker.result(10)
    futures[4].result(10)
    assert order == [0, 1, 3, 4]
    assert thread.stop()


def test_a_callback_of_the_engine_may_add_a_command() -> None:
    recorder = Recorder(0)
    thread = start(build_fake_engine(), recorder)
    inner: Future[Future[int]] = thread.call(lambda engine: thread.call(lambda engine: engine.num_blocks))
    assert inner.result(10).result(10) == 64
    assert thread.stop()


def test_a_waiting_reservation_is_granted_when_a_running_sequence_ends() -> None:
    recorder = Recorder(12)
    thread = start(build_fake_engine(num_blocks=8), recorder)
    granted: Future[list[int]] = Future()

    def reserve(engine: Engine) -> None:
        engine.add(Sequence(1, [1] * 17, greedy(12)))
        engine.step()
        engine.reserve(Sequence(2, [2] * 16, greedy(12)))
        engine.extend(2, granted.set_result)

    thread.call(reserve).result(10)
    assert len(granted.result(10)) == 4
    assert thread.stop()
