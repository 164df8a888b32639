from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from worker.admission import Admission
from worker.health import WorkerHealth
from worker.worker_metrics import WorkerMetrics


def _engine() -> Any:
    return SimpleNamespace(failure=asyncio.get_running_loop().create_future())


def _registration() -> Any:
    return SimpleNamespace(is_announced=asyncio.Event())


async def test_a_worker_is_alive_before_it_is_ready_and_while_it_drains() -> None:
    admission, registration = Admission(4), _registration()
    health = WorkerHealth(asyncio.get_running_loop(), _engine(), admission)
    assert health.ready() == "not in the registry yet"
    health.watch(registration)
    assert health.ready() == "not in the registry yet"
    registration.is_announced.set()
    assert health.ready() is None
    await admission.drain(1.0)
    assert health.ready() == "draining"
    assert await asyncio.to_thread(health.alive) is None


async def test_a_failed_engine_is_not_alive() -> None:
    engine = _engine()
    health = WorkerHealth(asyncio.get_running_loop(), engine, Admission(4))
    engine.failure.set_result(RuntimeError("out of memory"))
    assert health.alive() == "the engine failed"


async def test_a_loop_that_does_not_answer_is_not_alive() -> None:
    health = WorkerHealth(asyncio.get_running_loop(), _engine(), Admission(4), loop_answers_s=0.05)
    answers: list[str | None] = []
    asking = threading.Thread(target=lambda: answers.append(health.alive()))
    asking.start()
    asking.join()  # blocks this loop meanwhile
    assert answers == ["the event loop did not answer within 0.05 s"]


async def test_a_loop_that_has_ended_is_not_alive() -> None:
    ended = asyncio.new_event_loop()
    ended.close()
    assert WorkerHealth(ended, _engine(), Admission(4)).alive() == "the event loop has ended"


async def test_held_requests_and_the_store_are_metrics() -> None:
    registry, admission, is_up = CollectorRegistry(), Admission(4), [False]
    WorkerMetrics(registry, lambda: admission.num_requests, lambda: is_up[0])
    with admission.admit():
        assert registry.get_sample_value("baton_worker_held_requests") == 1
    assert registry.get_sample_value("baton_worker_held_requests") == 0
    assert registry.get_sample_value("baton_worker_store_up") == 0
    is_up[0] = True
    assert registry.get_sample_value("baton_worker_store_up") == pytest.approx(1)
