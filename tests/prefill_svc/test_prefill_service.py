"""The prefill side of a hand-off, spoken to in raw frames."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.kv_cache import KvCache
from proto.prefill_pb2 import KvChunk, PrefillCommitted, PrefillFinished, PrefillRequest, PrefillStarted
from servicekit.rpc import RETRY_AFTER_KEY, build_channel
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout
from tests.fakes.fake_workers import FakeWorker, GatedModel, greedy_spec, prefill_worker
from worker.conversions import layout_to_pb
from worker.kv_frames import FrameKind, checksum, combined_checksum, pack_frame, read_frame, read_header

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]


@asynccontextmanager
async def _call(worker: FakeWorker) -> AsyncIterator[Any]:
    async with build_channel(worker.address) as channel:
        method: Any = channel.stream_stream("/baton.v1.PrefillService/Prefill")
        call = method()
        try:
            yield call
        finally:
            call.cancel()


def _request(prompt_ids: list[int] = PROMPT, **fields: Any) -> bytes:
    spec_fields = fields.pop("spec", {})
    request = PrefillRequest(
        sequence=greedy_spec(prompt_ids, **spec_fields),
        kv_layout=layout_to_pb(fake_kv_layout()),
        host_id="that",
    )
    for name, value in fields.items():
        if name == "kv_layout":
            request.kv_layout.CopyFrom(layout_to_pb(value))
        else:
            setattr(request, name, value)
    return pack_frame(FrameKind.PREFILL_REQUEST, request)


async def _read(call: Any) -> Any:
    return read_frame(await call.read())


async def _until_finished(
    call: Any,
) -> tuple[PrefillStarted, list[tuple[KvChunk, memoryview]], PrefillFinished]:
    started = read_header(await _read(call), FrameKind.PREFILL_STARTED, PrefillStarted)
    chunks = []
    while (frame := await _read(call)).kind == FrameKind.KV_CHUNK:
        chunks.append((read_header(frame, FrameKind.KV_CHUNK, KvChunk), frame.payload))
    return started, chunks, read_header(frame, FrameKind.PREFILL_FINISHED, PrefillFinished)


async def _commit(call: Any) -> None:
    await call.write(pack_frame(FrameKind.PREFILL_COMMITTED, PrefillCommitted()))
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.OK


async def _fails(worker: FakeWorker, raw: bytes) -> grpc.aio.AioRpcError:
    async with _call(worker) as call:
        await call.write(raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
    return caught.value


@pytest.mark.parametrize("token_budget", [64, 32])
async def test_frames_carry_the_whole_cache_in_order(token_budget: int) -> None:
    async with prefill_worker(build_fake_engine(token_budget=token_budget)) as worker, _call(worker) as call:
        await call.write(_request())
        started, chunks, finished = await _until_finished(call)
        await _commit(call)

        layout = fake_kv_layout()
        assert (started.worker_id, started.num_blocks, started.num_hit_tokens) == ("prefill-a", 12, 0)
        assert finished.num_chunks == len(chunks)
        assert finished.num_bytes == 12 * layout.block_bytes == sum(len(payload) for _, payload in chunks)
        assert [chunk.checksum for chunk, _ in chunks] == [checksum(payload) for _, payload in chunks]
        assert finished.checksum == combined_checksum([chunk.checksum for chunk, _ in chunks])
        assert finished.first_token_id == expected_tokens(PROMPT, 1)[0]
        await worker.until_idle()
        assert worker.metric("baton_prefill_requests_total", outcome="committed") == 1


async def test_blocks_of_a_device_are_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = set()
    read_blocks = KvCache.read_blocks

    def read(self: KvCache, *arguments: Any) -> memoryview:
        readers.add(threading.get_ident())
        return read_blocks(self, *arguments)

    monkeypatch.setattr(KvCache, "read_blocks", read)
    monkeypatch.setattr(KvCache, "is_on_device", True)
    async with prefill_worker(build_fake_engine()) as worker, _call(worker) as call:
        await call.write(_request())
        _, chunks, finished = await _until_finished(call)
        await _commit(call)
        assert [chunk.checksum for chunk, _ in chunks] == [checksum(payload) for _, payload in chunks]
        assert finished.first_token_id == expected_tokens(PROMPT, 1)[0]
    assert readers
    assert threading.get_ident() not in readers


async def test_kv_goes_out_while_later_chunks_are_still_computed() -> None:
    model = GatedModel()
    async with (
        prefill_worker(build_fake_engine(token_budget=32, model=model)) as worker,
        _call(worker) as call,
    ):
        model.hold(num_passes_before=1)
        await call.write(_request())
        await _read(call)
        first = read_header(await _read(call), FrameKind.KV_CHUNK, KvChunk)
        model.open()

        assert (first.first_block, first.num_blocks, first.num_layers) == (0, 8, 3)


async def test_held_blocks_are_not_sent() -> None:
    async with prefill_worker(build_fake_engine()) as worker, _call(worker) as call:
        await call.write(_request(num_held_blocks=10))
        started, chunks, _ = await _until_finished(call)

        assert started.num_blocks == 12
        assert [(chunk.first_block, chunk.num_blocks) for chunk, _ in chunks] == [(10, 2)]


async def test_shared_memory_is_named_instead_of_bytes_on_one_host() -> None:
    async with (
        prefill_worker(build_fake_engine(is_shared=True), host_id="that") as worker,
        _call(worker) as call,
    ):
        await call.write(_request(accepts_shared_memory=True))
        started, chunks, _ = await _until_finished(call)
        shared = started.shared_kv_cache
        cache = KvCache.attach(shared.name, fake_kv_layout(), shared.num_blocks)
        read = [
            cache.read_blocks(chunk.first_layer, chunk.num_layers, list(chunk.source_block_ids))
            for chunk, _ in chunks
        ]

        assert [checksum(kv) for kv in read] == [chunk.checksum for chunk, _ in chunks]
        assert all(len(payload) == 0 for _, payload in chunks)
        cache.close()


@pytest.mark.parametrize("refusal", [{"host_id": "elsewhere"}, {"accepts_shared_memory": False}])
async def test_shared_memory_needs_one_host_and_consent(refusal: dict[str, Any]) -> None:
    async with (
        prefill_worker(build_fake_engine(is_shared=True), host_id="that") as worker,
        _call(worker) as call,
    ):
        await call.write(_request(**({"accepts_shared_memory": True} | refusal)))
        started, chunks, _ = await _until_finished(call)

        assert not started.HasField("shared_kv_cache")
        assert sum(len(payload) for _, payload in chunks) == 12 * fake_kv_layout().block_bytes


async def test_call_that_ends_without_commit_leaves_the_blocks_to_the_prefix_cache() -> None:
    async with prefill_worker(build_fake_engine()) as worker:
        async with _call(worker) as call:
            await call.write(_request())
            await _until_finished(call)
        await worker.until_idle()
        async with _call(worker) as call:
            await call.write(_request())
            started, _, _ = await _until_finished(call)

        assert started.num_hit_tokens == 44


async def test_blocks_stay_until_the_commit() -> None:
    async with prefill_worker(build_fake_engine()) as worker, _call(worker) as call:
        await call.write(_request())
        await _until_finished(call)
        assert await worker.used_blocks() == 12

        await _commit(call)
        await worker.until_idle()


async def test_deadline_ends_a_call_that_nobody_commits() -> None:
    async with prefill_worker(build_fake_engine()) as worker:
        error = await _fails(worker, _request(spec={"time_left_s": 0.3}))

        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await worker.until_idle()


async def test_layout_mismatch_names_the_fields_and_computes_nothing() -> None:
    model = GatedModel()
    async with prefill_worker(build_fake_engine(model=model)) as worker:
        error = await _fails(worker, _request(kv_layout=fake_kv_layout(8, "other weights")))

        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "block_size: 4 != 8" in (error.details() or "")
        assert "'fake' != 'other weights'" in (error.details() or "")
        assert model.num_forwards == 0


async def test_unknown_kv_dtype_is_a_layout_mismatch() -> None:
    request = PrefillRequest(sequence=greedy_spec(PROMPT), kv_layout=layout_to_pb(fake_kv_layout()))
    request.kv_layout.dtype = "int3"
    async with prefill_worker(build_fake_engine()) as worker:
        error = await _fails(worker, pack_frame(FrameKind.PREFILL_REQUEST, request))

        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x01", b"\xff\0\0\0\0", b"\x01\3\0\0\0\xff\xff\xff", pack_frame(FrameKind.KV_CHUNK, KvChunk())],
)
async def test_call_that_does_not_begin_with_a_request_is_refused(raw: bytes) -> None:
    async with prefill_worker(build_fake_engine()) as worker:
        error = await _fails(worker, raw)

        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("prompt_ids", "sampling"),
    [([], {}), ([1, 9999], {}), ([1] * 300, {}), ([1, 2], {"top_p": 2.0}), ([1, 2], {"temperature": -1.0})],
)
async def test_sequence_that_can_never_run_is_the_callers_fault(
    prompt_ids: list[int], sampling: dict[str, Any]
) -> None:
    async with prefill_worker(build_fake_engine()) as worker:
        error = await _fails(worker, _request(prompt_ids, spec={"sampling": sampling}))

        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        await worker.until_idle()


async def test_full_worker_says_when_to_come_back() -> None:
    model = GatedModel()
    async with prefill_worker(build_fake_engine(model=model), max_requests=1) as worker:
        async with _call(worker) as first:
            model.hold()
            await first.write(_request())
            await _read(first)
            error = await _fails(worker, _request())
            model.open()

        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(error.trailing_metadata() or ())[RETRY_AFTER_KEY]) > 0


async def test_draining_worker_refuses_and_finishes_what_runs() -> None:
    async with prefill_worker(build_fake_engine()) as worker, _call(worker) as running:
        await running.write(_request())
        await _until_finished(running)
        drain = asyncio.create_task(worker.admission.drain(30.0))
        await asyncio.sleep(0)
        error = await _fails(worker, _request())

        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        await _commit(running)
        assert await drain


async def test_drain_ends_with_its_grace_period() -> None:
    async with prefill_worker(build_fake_engine()) as worker, _call(worker) as running:
        await running.write(_request())
        await _until_finished(running)

        assert not await worker.admission.drain(0.01)
