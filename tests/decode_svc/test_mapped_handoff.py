"""Hand-offs whose receiver copies from the prefill worker's own cache, which it has mapped. The device is a
CPU here, and a shared memory file stands in for its memory; everything else is as between two GPUs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from engine.kv_cache import AttachedKvCache, KvCache
from engine.kv_export import KvExport
from prefill_svc import prefill_call
from prefill_svc.prefill_service import PrefillService
from proto.prefill_pb2 import KvChunk, PrefillStarted
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
from worker.kv_frames import FrameKind, pack_frame, read_frame, read_header

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]  # twelve blocks
NUM_SLOTS = 40
WAIT_S = 20.0


def sending_engine(**facts: Any) -> Any:
    return build_fake_engine(is_shared=True, outbox_slots=NUM_SLOTS, **facts)


@asynccontextmanager
async def workers(
    sender: Any = None, prefill_facts: dict[str, Any] | None = None, **decode_facts: Any
) -> AsyncIterator[tuple[FakeWorker, FakeWorker, FakeRouter]]:
    accepts = {"host_id": "one", "accepts_shared_memory": True, "accepts_device_memory": True}
    sender = sender or sending_engine()
    try:
        async with (
            prefill_worker(sender, **(accepts | (prefill_facts or {}))) as prefill,
            decode_worker(build_fake_engine(), **(accepts | decode_facts)) as decode,
            router_link(decode) as router,
        ):
            yield prefill, decode, router
    finally:
        sender.close()


async def hand_off(router: FakeRouter, prefill: FakeWorker, salt: str, num_tokens: int = 10) -> Reply:
    """No two salts share blocks."""
    return await router.finish(greedy_spec(PROMPT, num_tokens, cache_salt=salt), prefill)


async def map_first(router: FakeRouter, decode: FakeWorker, prefill: FakeWorker) -> None:
    """A first hand-off, and what it leads to."""
    first = await hand_off(router, prefill, "first")
    assert first.token_ids == expected_tokens(PROMPT, 10)
    await until(lambda: is_mapped(decode, prefill))


def is_mapped(decode: FakeWorker, prefill: FakeWorker) -> bool:
    with decode.transfers.device_mappings.mapped(prefill.address) as mapped:
        return mapped is not None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def open_shared(self: KvCache, exported: KvExport) -> AttachedKvCache:
    """Whatever device the cache says it is on."""
    return KvCache.attach(exported.memory.handle.decode(), self.layout, exported.num_blocks)


def received(decode: FakeWorker, carrier: str) -> float:
    return decode.metric("baton_handoff_bytes_total", carrier=carrier)


async def test_the_first_hand_off_maps_the_cache_and_later_ones_copy_from_it() -> None:
    async with workers() as (prefill, decode, router):
        await map_first(router, decode, prefill)
        num_bytes = 12 * decode.engine.engine.kv_layout.block_bytes
        await decode.until_idle()
        assert (received(decode, "shared_memory"), received(decode, "device_memory")) == (num_bytes, 0)

        later = [await hand_off(router, prefill, salt) for salt in ("a", "b")]
        assert [reply.token_ids for reply in later] == [expected_tokens(PROMPT, 10)] * 2
        assert not any(reply.timings.prefill_fell_back for reply in later)
        await decode.until_idle()
        await prefill.until_idle()
        assert (received(decode, "shared_memory"), received(decode, "device_memory")) == (
            num_bytes,
            2 * num_bytes,
        )
        assert prefill.metric("baton_prefill_sent_bytes_total", carrier="device_memory") == 2 * num_bytes
        assert prefill.metric("baton_prefill_requests_total", outcome="committed") == 3
        assert set(decode.transfers.rates.kv_rates()) == {"shared_memory"}


async def test_a_prefix_that_either_side_has_cached_is_right_too() -> None:
    async with workers(sending_engine(token_budget=20)) as (prefill, decode, router):
        await map_first(router, decode, prefill)
        prompts = [[*PROMPT[:30], *range(5, 5 + n)] for n in (9, 12, 9)]
        replies = await asyncio.gather(*(router.finish(greedy_spec(p, 8), prefill) for p in prompts))
        assert [reply.token_ids for reply in replies] == [expected_tokens(p, 8) for p in prompts]
        assert not any(reply.timings.prefill_fell_back for reply in replies)
        await decode.until_idle()
        await prefill.until_idle()


async def test_no_copy_is_made_and_no_slot_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GatedModel()
    async with workers(sending_engine(model=model, token_budget=32)) as (prefill, decode, router):
        await map_first(router, decode, prefill)
        outbox = prefill.engine.engine._outbox
        monkeypatch.setattr(outbox, "send", None)
        model.hold(1)
        _, reply = await router.submit(greedy_spec(PROMPT, 4), prefill)
        await model.until_held()
        assert outbox.num_free_slots == NUM_SLOTS
        model.open()
        await reply.ended.wait()
        assert reply.token_ids == expected_tokens(PROMPT, 4)
        assert not reply.timings.prefill_fell_back
        await decode.until_idle()


@pytest.mark.parametrize(
    ("prefill_facts", "decode_facts"),
    [
        ({}, {"host_id": "elsewhere"}),
        ({}, {"accepts_device_memory": False}),
        ({"accepts_device_memory": False}, {}),
    ],
)
async def test_it_needs_one_host_and_both_sides_consent(
    prefill_facts: dict[str, Any], decode_facts: dict[str, Any]
) -> None:
    async with workers(None, prefill_facts, **decode_facts) as (prefill, decode, router):
        for salt in ("a", "b"):
            reply = await hand_off(router, prefill, salt)
            assert reply.token_ids == expected_tokens(PROMPT, 10)
        await decode.until_idle()
        assert received(decode, "device_memory") == 0
        assert not decode.transfers.device_mappings._known


async def test_a_cache_that_cannot_be_opened_costs_no_hand_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: KvCache, exported: object) -> None:
        raise OSError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_CONTEXT")

    monkeypatch.setattr(KvCache, "open_peer", refuse)
    async with workers() as (prefill, decode, router):
        for salt in ("a", "b"):
            reply = await hand_off(router, prefill, salt)
            assert reply.token_ids == expected_tokens(PROMPT, 10)
            assert not reply.timings.prefill_fell_back
        await decode.until_idle()
        assert received(decode, "device_memory") == 0 < received(decode, "shared_memory")


async def test_blocks_are_held_while_they_are_copied_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_blocks, copying, may_go_on = KvCache.copy_blocks, threading.Event(), threading.Event()

    def slow_copy(self: KvCache, *arguments: Any) -> None:
        copying.set()
        assert may_go_on.wait(WAIT_S)
        copy_blocks(self, *arguments)

    monkeypatch.setattr(KvCache, "copy_blocks", slow_copy)
    monkeypatch.setattr(KvCache, "is_on_device", True)
    monkeypatch.setattr(KvCache, "open_peer", open_shared)
    async with workers() as (prefill, decode, router):
        await map_first(router, decode, prefill)
        _, reply = await router.submit(greedy_spec(PROMPT, 10, cache_salt="a"), prefill)
        await asyncio.to_thread(copying.wait, WAIT_S)
        await asyncio.sleep(0.1)  # the prefill worker is done, for all it knows
        assert await prefill.used_blocks() == 12
        assert not reply.has_tokens.is_set()
        may_go_on.set()
        await reply.ended.wait()
        assert reply.token_ids == expected_tokens(PROMPT, 10)
        assert not reply.timings.prefill_fell_back
        await decode.until_idle()
        await prefill.until_idle()


async def test_the_commit_waits_until_the_prefill_worker_says_that_it_held_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill worker whose call ended early may have computed something else into the blocks."""
    fails = False

    async def read_commit(context: Any) -> bool:
        committed = await honest(context)
        if fails:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed")
        return committed

    honest = prefill_call._read_commit
    monkeypatch.setattr(prefill_call, "_read_commit", read_commit)
    async with workers() as (prefill, decode, router):
        await map_first(router, decode, prefill)
        await decode.until_idle()
        num_committed = decode.metric("baton_handoffs_total", state="COMMITTED")
        fails = True
        reply = await hand_off(router, prefill, "a")
        assert reply.timings.prefill_fell_back
        assert reply.token_ids == expected_tokens(PROMPT, 10)
        await decode.until_idle()
        await prefill.until_idle()
        assert decode.metric("baton_handoffs_total", state="COMMITTED") == num_committed
        assert decode.metric("baton_handoff_fallbacks_total", reason="HandoffFailed") == 1


def first_source_outside(chunk: KvChunk) -> None:
    chunk.source_block_ids[0] = 64


def one_source_less(chunk: KvChunk) -> None:
    del chunk.source_block_ids[-1]


def other_target(chunk: KvChunk) -> None:
    chunk.first_block += 1


@pytest.mark.parametrize("change", [first_source_outside, one_source_less, other_target])
async def test_a_chunk_that_makes_no_sense_is_refused(
    change: Callable[[KvChunk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = False

    def tamper(raw: bytes) -> bytes:
        frame = read_frame(raw)
        if not changes or frame.kind != FrameKind.KV_CHUNK:
            return raw
        chunk = read_header(frame, FrameKind.KV_CHUNK, KvChunk)
        change(chunk)
        return pack_frame(FrameKind.KV_CHUNK, chunk, frame.payload)

    tamper_with(monkeypatch, tamper)
    async with workers() as (prefill, decode, router):
        await map_first(router, decode, prefill)
        changes = True
        reply = await hand_off(router, prefill, "a")
        assert reply.timings.prefill_fell_back
        assert reply.token_ids == expected_tokens(PROMPT, 10)
        await decode.until_idle()
        await prefill.until_idle()


async def test_blocks_of_a_cache_that_was_not_named_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(raw: bytes) -> bytes:
        frame = read_frame(raw)
        if frame.kind != FrameKind.PREFILL_STARTED:
            return raw
        started = read_header(frame, FrameKind.PREFILL_STARTED, PrefillStarted)
        started.is_in_mapped_cache = True
        return pack_frame(FrameKind.PREFILL_STARTED, started)

    tamper_with(monkeypatch, tamper)
    async with workers() as (prefill, decode, router):
        reply = await hand_off(router, prefill, "a")
        assert reply.timings.prefill_fell_back
        assert reply.token_ids == expected_tokens(PROMPT, 10)
        await decode.until_idle()


def tamper_with(monkeypatch: pytest.MonkeyPatch, tamper: Callable[[bytes], bytes]) -> None:
    honest = PrefillService.prefill

    class Context:
        def __init__(self, context: Any) -> None:
            self._context = context

        def __getattr__(self, name: str) -> Any:
            return getattr(self._context, name)

        async def write(self, raw: bytes) -> None:
            await self._context.write(tamper(raw))

    async def prefill(self: PrefillService, requests: object, context: Any) -> None:
        await honest(self, requests, Context(context))

    monkeypatch.setattr(PrefillService, "prefill", prefill)


async def test_a_prefill_worker_that_started_anew_is_mapped_anew() -> None:
    accepts = {"host_id": "one", "accepts_shared_memory": True, "accepts_device_memory": True}
    async with decode_worker(build_fake_engine(), **accepts) as decode, router_link(decode) as router:
        names, port = [], 0
        for _ in range(2):
            sender = sending_engine()
            async with prefill_worker(sender, port=port, **accepts) as prefill:
                port = int(prefill.address.rpartition(":")[2])
                name = sender.kv_cache.exported.name

                def has_it(address: str = prefill.address, name: str = name) -> bool:
                    with decode.transfers.device_mappings.mapped(address) as mapped:
                        return mapped is not None and mapped.name == name

                async with asyncio.timeout(WAIT_S):
                    while not has_it():  # the channel to the old one may have to break first
                        reply = await hand_off(router, prefill, f"first {name} {len(names)}")
                        assert reply.token_ids == expected_tokens(PROMPT, 10)
                before = received(decode, "device_memory")
                reply = await hand_off(router, prefill, name)
                assert reply.token_ids == expected_tokens(PROMPT, 10)
                assert not reply.timings.prefill_fell_back
                await decode.until_idle()
                assert received(decode, "device_memory") > before
                names.append(name)
            sender.close()
        assert len(set(names)) == 2


async def test_a_prefill_worker_that_dies_in_the_middle_is_replaced_by_local_prefill() -> None:
    model = GatedModel()
    async with workers(sending_engine(model=model, token_budget=32)) as (prefill, decode, router):
        await map_first(router, decode, prefill)
        model.hold(1)
        _, reply = await router.submit(greedy_spec(PROMPT, 10), prefill)
        await model.until_held()
        await prefill.server.stop(0)
        await reply.ended.wait()
        model.open()
        assert reply.timings.prefill_fell_back
        assert reply.token_ids == expected_tokens(PROMPT, 10)
        await decode.until_idle()
        await prefill.until_idle()


async def test_a_request_that_is_cancelled_while_blocks_are_copied_leaves_nothing() -> None:
    model = GatedModel()
    async with workers(sending_engine(model=model, token_budget=32)) as (prefill, decode, router):
        await map_first(router, decode, prefill)
        model.hold(1)
        key, reply = await router.submit(greedy_spec(PROMPT, 10), prefill)
        await model.until_held()
        await router.cancel(key)
        await reply.ended.wait()
        model.open()
        await decode.until_idle()
        await prefill.until_idle()
        mapping = decode.transfers.device_mappings._mappings[prefill.address]
        assert mapping.num_users == 0
