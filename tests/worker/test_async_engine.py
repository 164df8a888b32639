from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from engine.engine import Engine
from engine.outputs import SequenceOutput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kvstore.embedded import EmbeddedServer
from prefill_svc.build import build_service
from prefill_svc.settings import PrefillSettings
from servicekit.errors import WorkerLost
from tests.fakes.fake_model import FakeModel, build_fake_engine, expected_tokens
from worker import worker_process
from worker.async_engine import AsyncEngine
from worker.worker_process import EXIT_FAILED, Service, WorkerParts, WorkerProcess

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


class _BrokenModel(FakeModel):
    def forward(self, *arguments: Any, **keywords: Any) -> NoReturn:
        raise RuntimeError("device lost")


async def test_outputs_reach_the_sink_in_order_and_stop_with_detach() -> None:
    engine = AsyncEngine(build_fake_engine())
    outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()
    engine.attach(7, outputs.put_nowait)
    engine.start()
    await engine.call(lambda e: e.add(Sequence(7, [1, 2, 3], GREEDY)))

    token_ids = [token_id for _ in range(5) for token_id in (await outputs.get()).token_ids]
    assert token_ids == expected_tokens([1, 2, 3], 5)
    assert await engine.stop(10.0)


async def test_what_a_call_raises_comes_back() -> None:
    engine = AsyncEngine(build_fake_engine())
    engine.start()

    with pytest.raises(ValueError, match="prompt is empty"):
        await engine.call(lambda e: e.add(Sequence(1, [], GREEDY)))
    assert await engine.stop(10.0)


async def test_failed_engine_is_known_and_takes_no_more_calls() -> None:
    engine = AsyncEngine(build_fake_engine(model=_BrokenModel()))
    engine.start()
    await engine.call(lambda e: e.add(Sequence(1, [1, 2], GREEDY)))

    assert str(await engine.failure) == "device lost"
    with pytest.raises(WorkerLost, match="device lost"):
        await engine.call(lambda e: e.load())
    engine.post(lambda e: e.abort(1))


def test_process_with_a_failed_engine_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def build(settings: object, membership: object) -> Engine:
        return build_fake_engine(model=_BrokenModel())

    def build_busy_service(parts: WorkerParts) -> Service:
        parts.engine.post(lambda engine: engine.add(Sequence(1, [1, 2], GREEDY)))
        return build_service(parts)

    monkeypatch.setattr(worker_process, "build_worker_engine", build)
    server = EmbeddedServer()
    settings = PrefillSettings(model=tmp_path, redis_url=server.start())
    try:
        assert WorkerProcess("prefill", settings, build_busy_service).run() == EXIT_FAILED
    finally:
        server.stop()


async def test_what_is_sent_and_refused_is_told_in_the_loop() -> None:
    engine = AsyncEngine(build_fake_engine())
    engine.start()
    failures: asyncio.Queue[BaseException] = asyncio.Queue()
    engine.send(lambda e: e.add(Sequence(1, [], GREEDY)), failures.put_nowait)
    assert "prompt is empty" in str(await failures.get())
    engine.send(lambda e: e.load(), failures.put_nowait)
    await engine.call(lambda e: e.load())
    assert failures.empty()

    assert await engine.stop(10.0)
    engine.send(lambda e: e.load(), failures.put_nowait)
    assert isinstance(await failures.get(), WorkerLost)
