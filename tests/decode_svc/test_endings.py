"""Cancelled, cut off or out of time, in every state: both workers give everything back and serve the next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from proto import common_pb2
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.fake_workers import (
    FakeRouter,
    FakeWorker,
    GatedModel,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]
OTHER = [(5 * i + 2) % 200 + 1 for i in range(10)]


@dataclass
class Stack:
    prefill: FakeWorker
    prefill_model: GatedModel
    decode: FakeWorker
    decode_model: GatedModel
    router: FakeRouter
    link: AsyncExitStack

    async def submit(self, time_left_s: float) -> tuple[int, Reply]:
        spec = greedy_spec(PROMPT, 150, time_left_s=time_left_s)
        return await self.router.submit(spec, self.prefill)

    def open(self) -> None:
        self.prefill_model.open()
        self.decode_model.open()


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    prefill_model, decode_model = GatedModel(), GatedModel()
    async with AsyncExitStack() as workers:
        # The budget cuts PROMPT in two chunks.
        prefill_engine = build_fake_engine(model=prefill_model, token_budget=32)
        prefill = await workers.enter_async_context(prefill_worker(prefill_engine))
        decode = await workers.enter_async_context(decode_worker(build_fake_engine(model=decode_model)))
        link = await workers.enter_async_context(AsyncExitStack())
        router = await link.enter_async_context(router_link(decode))
        stack = Stack(prefill, prefill_model, decode, decode_model, router, link)
        try:
            yield stack
        finally:
            stack.open()


async def queued(stack: Stack, time_left_s: float) -> tuple[int, Reply]:
    stack.prefill_model.hold()
    async with router_link(stack.decode) as other:
        await other.submit(greedy_spec(OTHER, 3), stack.prefill)
        await stack.prefill_model.until_held()
        key, reply = await stack.submit(time_left_s)
        while stack.prefill.admission.num_requests < 2 and not reply.ended.is_set():
            await stack.decode.used_blocks()
        assert time_left_s or not reply.ended.is_set()
    return key, reply


async def started(stack: Stack, time_left_s: float) -> tuple[int, Reply]:
    stack.prefill_model.hold()
    key, reply = await stack.submit(time_left_s)
    await stack.prefill_model.until_held()
    while await stack.decode.used_blocks() < 12 and not reply.ended.is_set():
        pass
    return key, reply


async def between_chunks(stack: Stack, time_left_s: float) -> tuple[int, Reply]:
    stack.prefill_model.hold(num_passes_before=1)
    submitted = await stack.submit(time_left_s)
    await stack.prefill_model.until_held()
    return submitted


async def finished_not_committed(stack: Stack, time_left_s: float) -> tuple[int, Reply]:
    key, reply = await started(stack, time_left_s)
    stack.decode_model.hold()
    await stack.router.submit(greedy_spec(OTHER, 3))
    await stack.decode_model.until_held()
    stack.prefill_model.open()
    while not await _is_kept(stack.prefill) and not reply.ended.is_set():
        pass
    return key, reply


async def decoding(stack: Stack, time_left_s: float) -> tuple[int, Reply]:
    key, reply = await stack.submit(time_left_s)
    await reply.has_tokens.wait()
    stack.decode_model.hold()
    await stack.decode_model.until_held()
    return key, reply


async def _is_kept(prefill: FakeWorker) -> bool:
    load = await prefill.engine.call(lambda engine: engine.load())
    return load.num_used_blocks == 12 and load.num_running == 0


async def cancelled(stack: Stack, key: int, reply: Reply) -> None:
    await stack.router.cancel(key)
    await reply.ended.wait()
    assert reply.last.finish_reason == common_pb2.FINISH_REASON_ABORTED


async def cut_off(stack: Stack, key: int, reply: Reply) -> None:
    await stack.link.aclose()


async def out_of_time(stack: Stack, key: int, reply: Reply) -> None:
    await reply.ended.wait()
    assert reply.last.error.kind == common_pb2.ERROR_KIND_OVERLOADED
    assert "deadline" in reply.last.error.message


@pytest.mark.parametrize("end", [cancelled, cut_off, out_of_time])
@pytest.mark.parametrize("reach", [queued, started, between_chunks, finished_not_committed, decoding])
async def test_request_that_ends_early_leaves_nothing_behind(
    stack: Stack,
    reach: Callable[[Stack, float], Awaitable[tuple[int, Reply]]],
    end: Callable[[Stack, int, Reply], Awaitable[None]],
) -> None:
    key, reply = await reach(stack, 1.0 if end is out_of_time else 0.0)
    await end(stack, key, reply)
    stack.open()

    await stack.decode.until_idle()
    await stack.prefill.until_idle()
    async with router_link(stack.decode) as router:
        after = await router.finish(greedy_spec(PROMPT, 9), stack.prefill)
    assert after.token_ids == expected_tokens(PROMPT, 9)
    assert after.timings.prefill_worker_id == "prefill-a"
