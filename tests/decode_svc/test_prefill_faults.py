"""A prefill worker that refuses, lies or dies: decode prefills by itself, nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from prefill_svc.prefill_service import PrefillService
from proto import common_pb2
from proto.prefill_pb2 import KvChunk, PrefillFinished, PrefillStarted
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.fake_workers import (
    FakeWorker,
    GatedModel,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)
from worker.kv_frames import FrameKind, combined_checksum, pack_frame, read_frame, read_header
from worker.transfers import TransferEnvironment

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]

Tamper = Callable[[FrameKind, bytes], Iterator[bytes]]


class _TamperedContext:
    def __init__(self, context: Any, tamper: Tamper) -> None:
        self._context = context
        self._tamper = tamper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, raw: bytes) -> None:
        for frame in self._tamper(FrameKind(read_frame(raw).kind), raw):
            await self._context.write(frame)


def _tamper_with(monkeypatch: pytest.MonkeyPatch, tamper: Tamper) -> None:
    honest = PrefillService.prefill

    async def prefill(self: PrefillService, requests: object, context: Any) -> None:
        await honest(self, requests, _TamperedContext(context, tamper))

    monkeypatch.setattr(PrefillService, "prefill", prefill)


def _changed_chunk(change: Callable[[KvChunk], None]) -> Tamper:
    def tamper(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
        if kind is not FrameKind.KV_CHUNK:
            yield raw
            return
        frame = read_frame(raw)
        chunk = read_header(frame, FrameKind.KV_CHUNK, KvChunk)
        change(chunk)
        yield pack_frame(FrameKind.KV_CHUNK, chunk, frame.payload)

    return tamper


def _flip_a_bit(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield raw[:-1] + bytes([raw[-1] ^ 1]) if kind is FrameKind.KV_CHUNK else raw


def _cut_payload(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield raw[:-4] if kind is FrameKind.KV_CHUNK else raw


def _repeat_chunk(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield raw
    if kind is FrameKind.KV_CHUNK:
        yield raw


def _drop_chunk(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is not FrameKind.KV_CHUNK:
        yield raw


def _drop_chunk_and_its_count(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.PREFILL_FINISHED:
        finished = read_header(read_frame(raw), kind, PrefillFinished)
        finished.num_chunks, finished.num_bytes, finished.checksum = 0, 0, combined_checksum([])
        yield pack_frame(kind, finished)
    elif kind is FrameKind.PREFILL_STARTED:
        yield raw


def _wrong_combined_checksum(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.PREFILL_FINISHED:
        finished = read_header(read_frame(raw), kind, PrefillFinished)
        finished.checksum ^= 1
        raw = pack_frame(kind, finished)
    yield raw


def _token_outside_vocabulary(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.PREFILL_FINISHED:
        finished = read_header(read_frame(raw), kind, PrefillFinished)
        finished.first_token_id = 9999
        raw = pack_frame(kind, finished)
    yield raw


def _wrong_number_of_blocks(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.PREFILL_STARTED:
        started = read_header(read_frame(raw), kind, PrefillStarted)
        started.num_blocks += 1
        raw = pack_frame(kind, started)
    yield raw


def _unasked_shared_memory(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.PREFILL_STARTED:
        started = read_header(read_frame(raw), kind, PrefillStarted)
        started.shared_kv_cache.name = "1.2.nothing"
        raw = pack_frame(kind, started)
    yield raw


def _garbage(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield b"\x07garbage"


def _started_twice(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield raw
    if kind is FrameKind.PREFILL_STARTED:
        yield raw


def _past_the_last_block(chunk: KvChunk) -> None:
    chunk.first_block += 1


def _past_the_last_layer(chunk: KvChunk) -> None:
    chunk.first_layer = 2


def _empty(chunk: KvChunk) -> None:
    chunk.num_layers = 0


def _names_source_blocks(chunk: KvChunk) -> None:
    chunk.source_block_ids.append(0)


LIES = [
    _flip_a_bit,
    _cut_payload,
    _repeat_chunk,
    _drop_chunk,
    _drop_chunk_and_its_count,
    _wrong_combined_checksum,
    _token_outside_vocabulary,
    _wrong_number_of_blocks,
    _unasked_shared_memory,
    _garbage,
    _started_twice,
    *(_changed_chunk(c) for c in (_past_the_last_block, _past_the_last_layer, _empty, _names_source_blocks)),
]


async def _assert_fell_back(reply: Reply, decode: FakeWorker, reason: str) -> None:
    assert reply.token_ids == expected_tokens(PROMPT, 10)
    assert reply.timings.prefill_fell_back
    assert reply.timings.prefill_worker_id == ""
    assert decode.metric("baton_handoff_fallbacks_total", reason=reason) == 1
    assert decode.metric("baton_handoffs_total", state="ABORTED") == 1
    await decode.until_idle()


@pytest.mark.parametrize("lie", LIES)
async def test_kv_that_is_not_what_it_should_be_is_computed_again(
    lie: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tamper_with(monkeypatch, lie)
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "HandoffFailed")
        await prefill.until_idle()


async def test_shared_memory_that_changes_after_the_checksum_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong_checksum(chunk: KvChunk) -> None:
        chunk.checksum ^= 1

    _tamper_with(monkeypatch, _changed_chunk(wrong_checksum))
    async with (
        prefill_worker(build_fake_engine(is_shared=True), host_id="one") as prefill,
        decode_worker(build_fake_engine(), host_id="one", accepts_shared_memory=True) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "HandoffFailed")


async def test_source_block_outside_the_shared_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(chunk: KvChunk) -> None:
        chunk.source_block_ids[0] = 64

    _tamper_with(monkeypatch, _changed_chunk(outside))
    async with (
        prefill_worker(build_fake_engine(is_shared=True), host_id="one") as prefill,
        decode_worker(build_fake_engine(), host_id="one", accepts_shared_memory=True) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "HandoffFailed")


async def test_prefill_worker_that_does_not_exist_is_replaced_by_local_prefill() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        reply = await router.finish(greedy_spec(PROMPT, 10), "127.0.0.1:1")

        await _assert_fell_back(reply, decode, "WorkerLost")


async def test_full_prefill_worker_is_replaced_by_local_prefill() -> None:
    async with (
        prefill_worker(build_fake_engine(), max_requests=0) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "Overloaded")


async def test_prefill_worker_with_another_layout_is_replaced_by_local_prefill() -> None:
    async with (
        prefill_worker(build_fake_engine(block_size=8)) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "HandoffFailed")


async def test_bug_in_the_prefill_service_is_replaced_by_local_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: TransferEnvironment, request: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(TransferEnvironment, "sending_carrier", broken)
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), prefill)

        await _assert_fell_back(reply, decode, "ServingError")


@pytest.mark.parametrize("num_passes_before", [0, 1])
async def test_prefill_worker_that_stops_in_the_middle_is_replaced_by_local_prefill(
    num_passes_before: int,
) -> None:
    model = GatedModel()
    async with (
        prefill_worker(build_fake_engine(model=model, token_budget=32)) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        model.hold(num_passes_before)
        _, reply = await router.submit(greedy_spec(PROMPT, 10), prefill)
        await model.until_held()
        await prefill.server.stop(0)
        await reply.ended.wait()
        model.open()

        await _assert_fell_back(reply, decode, "WorkerLost")
        await prefill.until_idle()


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN])
async def test_status_that_nobody_meant_is_replaced_by_local_prefill(
    code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prefill(self: PrefillService, requests: object, context: Any) -> None:
        await context.read()
        await context.abort(code, "odd")

    monkeypatch.setattr(PrefillService, "prefill", prefill)
    async with (
        prefill_worker(build_fake_engine()) as worker,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 10), worker)

        await _assert_fell_back(reply, decode, "WorkerLost")


async def test_restarted_prefill_worker_at_the_same_address_is_used_again() -> None:
    async with (
        decode_worker(build_fake_engine(), host_id="one", accepts_shared_memory=True) as decode,
        router_link(decode) as router,
    ):
        async with prefill_worker(build_fake_engine(is_shared=True), host_id="one") as first:
            port = int(first.address.rpartition(":")[2])
            before = await router.finish(greedy_spec(PROMPT, 10), first)
        assert before.timings.prefill_worker_id == "prefill-a"

        async with prefill_worker(build_fake_engine(is_shared=True), host_id="one", port=port) as second:
            async with asyncio.timeout(20):
                while True:
                    after = await router.finish(greedy_spec(PROMPT[:44], 10), second)
                    if not after.timings.prefill_fell_back:
                        break
        assert after.token_ids == expected_tokens(PROMPT[:44], 10)
        await decode.until_idle()


async def test_request_that_no_worker_can_run_goes_back_to_the_caller() -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec([5, 9999], 10), prefill)

        assert reply.last.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST
        assert "9999" in reply.last.error.message
        await decode.until_idle()
