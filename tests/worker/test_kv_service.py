"""The holder's side of a fetch, spoken to in raw frames."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.engine import Engine
from engine.kv_cache import KvCache
from proto.kv_pb2 import FetchFinished, FetchRequest, FetchStarted
from proto.prefill_pb2 import KvChunk
from servicekit.rpc import build_channel
from tests.fakes.fake_model import expected_tokens, fake_kv_layout
from tests.fakes.fake_workers import FakeWorker, decode_worker, greedy_spec, router_link
from tests.fakes.pinning_engine import PinningEngine, WatchedRun, build_pinning_engine
from worker import fetch_call
from worker.conversions import layout_to_pb
from worker.fetch_limit import FetchLimit
from worker.kv_carrier import StreamCarrier
from worker.kv_frames import (
    FETCH_METHOD,
    KV_SERVICE,
    FrameKind,
    checksum,
    combined_checksum,
    open_call,
    pack_frame,
    read_frame,
    read_header,
)

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]  # 11 full blocks of 4
LAYOUT = fake_kv_layout()


def _request(**fields: Any) -> FetchRequest:
    layout = fields.pop("kv_layout", LAYOUT)
    values = {"token_ids": PROMPT, "num_blocks": 11, "host_id": "reader", **fields}
    return FetchRequest(request_id="test", kv_layout=layout_to_pb(layout), **values)


@asynccontextmanager
async def _holder(engine: PinningEngine | None = None, **facts: Any) -> AsyncIterator[FakeWorker]:
    """A worker that has computed PROMPT for tenant `us` with salt `s`."""
    engine = engine or build_pinning_engine()
    async with decode_worker(engine, **facts) as worker:
        async with router_link(worker) as router:
            spec = greedy_spec(PROMPT, 1, tenant="us", cache_salt="s")
            assert (await router.finish(spec)).token_ids == expected_tokens(PROMPT, 1)
        await worker.until_idle()
        yield worker


@asynccontextmanager
async def _call(worker: FakeWorker, first: bytes) -> AsyncIterator[Any]:
    async with build_channel(worker.address) as channel:
        call = open_call(channel, KV_SERVICE, FETCH_METHOD)
        try:
            await call.write(first)
            yield call
        finally:
            call.cancel()


def _frame(request: FetchRequest) -> bytes:
    return pack_frame(FrameKind.FETCH_REQUEST, request)


async def _fetch(
    worker: FakeWorker, request: FetchRequest
) -> tuple[FetchStarted, list[tuple[KvChunk, memoryview]], FetchFinished]:
    async with _call(worker, _frame(request)) as call:
        started = read_header(read_frame(await call.read()), FrameKind.FETCH_STARTED, FetchStarted)
        chunks = []
        while (frame := read_frame(await call.read())).kind == FrameKind.KV_CHUNK:
            chunks.append((read_header(frame, FrameKind.KV_CHUNK, KvChunk), frame.payload))
        finished = read_header(frame, FrameKind.FETCH_FINISHED, FetchFinished)
        assert await call.code() == grpc.StatusCode.OK
        return started, chunks, finished


async def _fails(worker: FakeWorker, raw: bytes) -> grpc.aio.AioRpcError:
    async with _call(worker, raw) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
    return caught.value


async def _until_unpinned(worker: FakeWorker) -> None:
    """Until no fetch is served; then nothing may be pinned."""
    async with asyncio.timeout(10):
        while worker.kv_service.limit.num_fetches:
            await worker.engine.call(lambda engine: None)
    assert await worker.used_blocks() == 0
    assert worker.kv_service.limit.num_pinned_blocks == 0


def _ours(**fields: Any) -> FetchRequest:
    return _request(**({"tenant": "us", "cache_salt": "s"} | fields))


@pytest.mark.parametrize("hides_device", [False, True])
async def test_whole_blocks_come_last_first_with_their_checksums(
    hides_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_call, "TARGET_CHUNK_BYTES", 4 * LAYOUT.block_bytes)
    async with _holder(build_pinning_engine(hides_device=hides_device)) as worker:
        started, chunks, finished = await _fetch(worker, _ours())

        assert started.num_blocks == 11
        places = [(chunk.first_block, chunk.num_blocks, chunk.num_layers) for chunk, _ in chunks]
        assert places == [(7, 4, 3), (3, 4, 3), (0, 3, 3)]
        assert [chunk.checksum for chunk, _ in chunks] == [checksum(payload) for _, payload in chunks]
        assert finished.num_bytes == 11 * LAYOUT.block_bytes
        assert finished.checksum == combined_checksum([chunk.checksum for chunk, _ in chunks])
        await _until_unpinned(worker)
        assert worker.metric("baton_fetch_served_calls_total", outcome="served") == 1
        assert worker.metric("baton_fetch_sent_bytes_total", carrier="stream") == finished.num_bytes


async def test_fetched_bytes_are_those_of_the_holders_cache() -> None:
    async with _holder() as worker:
        _, [(chunk, payload)], _ = await _fetch(worker, _ours(first_block=2, num_blocks=3))
        chain = worker.engine.engine.hash_chain
        hashes = chain.hashes(PROMPT, "s", "us")[2:5]
        block_ids = worker.engine.engine._pool.lookup(hashes)

        assert (chunk.first_block, chunk.num_blocks) == (2, 3)
        assert bytes(payload) == bytes(worker.engine.engine.kv_cache.read_blocks(0, 3, block_ids))


async def test_reader_of_one_host_is_told_where_the_blocks_are() -> None:
    engine = build_pinning_engine(is_shared=True)
    async with _holder(engine, host_id="reader") as worker:
        started, chunks, finished = await _fetch(worker, _ours(accepts_shared_memory=True))
        shared = started.shared_kv_cache
        cache = KvCache.attach(shared.name, LAYOUT, shared.num_blocks)
        try:
            for chunk, payload in chunks:
                assert not payload
                kv_bytes = cache.read_blocks(0, chunk.num_layers, list(chunk.source_block_ids))
                assert checksum(kv_bytes) == chunk.checksum
        finally:
            cache.close()
        assert finished.num_bytes == 11 * LAYOUT.block_bytes


@pytest.mark.parametrize("fields", [{"host_id": "other"}, {"accepts_shared_memory": False}])
async def test_shared_memory_needs_one_host_and_consent(fields: dict[str, Any]) -> None:
    async with _holder(build_pinning_engine(is_shared=True), host_id="reader") as worker:
        request = _ours(**({"accepts_shared_memory": True} | fields))
        started, chunks, _ = await _fetch(worker, request)

        assert not started.HasField("shared_kv_cache")
        assert sum(len(payload) for _, payload in chunks) == 11 * LAYOUT.block_bytes


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": "them"},
        {"tenant": ""},
        {"cache_salt": "t"},
        {"tenant": "s", "cache_salt": "us"},
        {"token_ids": [PROMPT[0] + 1, *PROMPT[1:]]},
    ],
)
async def test_other_tenant_salt_or_tokens_get_no_block(fields: dict[str, Any]) -> None:
    async with _holder() as worker:
        started, chunks, finished = await _fetch(worker, _ours(**fields))

        assert (started.num_blocks, chunks, finished.num_bytes) == (0, [], 0)
        await _until_unpinned(worker)
        assert worker.metric("baton_fetch_served_calls_total", outcome="missed") == 1


async def test_tokens_that_differ_late_get_the_blocks_before() -> None:
    async with _holder() as worker:
        changed = [*PROMPT[:21], PROMPT[21] + 1, *PROMPT[22:]]
        started, _, finished = await _fetch(worker, _ours(token_ids=changed))

        assert (started.num_blocks, finished.num_bytes) == (5, 5 * LAYOUT.block_bytes)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x06",
        b"\xff\0\0\0\0",
        b"\x06\3\0\0\0\xff\xff\xff",
        pack_frame(FrameKind.KV_CHUNK, KvChunk()),
        _frame(_ours(num_blocks=0)),
        _frame(_ours(num_blocks=12)),
        _frame(_ours(first_block=1)),
        _frame(_ours(first_block=2**32 - 1, num_blocks=2**32 - 1)),
        _frame(_ours(token_ids=PROMPT * 30)),
        _frame(_ours(token_ids=[2**32 - 1] * 300, num_blocks=75)),
    ],
)
async def test_request_that_makes_no_sense_is_refused_and_pins_nothing(raw: bytes) -> None:
    async with _holder() as worker:
        error = await _fails(worker, raw)

        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        await _until_unpinned(worker)


async def test_other_layout_is_refused_before_anything_is_pinned() -> None:
    async with _holder() as worker:
        error = await _fails(worker, _frame(_ours(kv_layout=fake_kv_layout(8, "other weights"))))

        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "'fake' != 'other weights'" in (error.details() or "")
        await _until_unpinned(worker)


async def test_fetches_beyond_the_limit_are_refused_and_prefill_goes_on() -> None:
    limit = FetchLimit(64, max_fetches=1)
    async with _holder(fetch_limit=limit) as worker:
        with limit.admit(1):
            error = await _fails(worker, _frame(_ours()))
            async with router_link(worker) as router:
                reply = await router.finish(greedy_spec([1, 2, 3], 2))

        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reply.token_ids == expected_tokens([1, 2, 3], 2)
        assert worker.metric("baton_fetch_served_calls_total", outcome="refused") == 1


async def test_fetches_pin_no_more_than_their_share_of_the_cache() -> None:
    async with _holder(fetch_limit=FetchLimit(20)) as worker:
        started, _, _ = await _fetch(worker, _ours())

        assert started.num_blocks == 5
        await _until_unpinned(worker)


class _StuckRun(WatchedRun):
    """Stops before the second read until let go."""

    entered: Callable[[], object]
    may_read: Callable[[], object]
    num_reads = 0

    def is_on_device(self, start: int, stop: int) -> list[int] | None:
        self.num_reads += 1
        if self.num_reads == 2:
            type(self).entered()
            type(self).may_read()
        return super().is_on_device(start, stop)


def _stuck_engine(monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> tuple[PinningEngine, Any, Any]:
    entered, may_read = threading.Event(), threading.Event()

    def wait() -> None:
        assert may_read.wait(20), "a test left a read waiting"

    monkeypatch.setattr(fetch_call, "TARGET_CHUNK_BYTES", 4 * LAYOUT.block_bytes)
    run_type = type(
        "Run", (_StuckRun,), {"entered": staticmethod(entered.set), "may_read": staticmethod(wait)}
    )
    return build_pinning_engine(run_type=run_type, num_blocks=num_blocks), entered, may_read


async def test_pinned_block_is_not_evicted_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, entered, may_read = _stuck_engine(monkeypatch, 24)
    async with _holder(engine, fetch_limit=FetchLimit(64)) as worker:
        fetch = asyncio.create_task(_fetch(worker, _ours()))
        await asyncio.to_thread(entered.wait, 20)
        before = _contents(engine)
        async with router_link(worker) as router:
            # Each takes nearly all that is not pinned, so everything else is evicted, several times.
            for first in range(1, 6):
                prompt = [first] * 44
                assert (await router.finish(greedy_spec(prompt, 2))).token_ids == expected_tokens(prompt, 2)
        assert _contents(engine) == before
        may_read.set()
        _, chunks, finished = await fetch

        assert [checksum(payload) for _, payload in chunks] == [chunk.checksum for chunk, _ in chunks]
        assert b"".join(reversed([_by_block(chunk, payload) for chunk, payload in chunks])) == before
        assert finished.num_bytes == 11 * LAYOUT.block_bytes
        await _until_unpinned(worker)


def _contents(engine: Engine) -> bytes:
    """PROMPT's blocks, block by block."""
    block_ids = engine._pool.lookup(engine.hash_chain.hashes(PROMPT, "s", "us"))
    assert len(block_ids) == 11
    return b"".join(bytes(engine.kv_cache.read_blocks(0, 3, [block_id])) for block_id in block_ids)


def _by_block(chunk: KvChunk, payload: memoryview) -> bytes:
    """[layer][block] as [block][layer]."""
    size = len(payload) // chunk.num_layers // chunk.num_blocks
    parts = [payload[start : start + size] for start in range(0, len(payload), size)]
    order = [
        layer * chunk.num_blocks + b for b in range(chunk.num_blocks) for layer in range(chunk.num_layers)
    ]
    return b"".join(bytes(parts[i]) for i in order)


async def test_reader_that_goes_away_in_the_middle_leaves_nothing_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, entered, may_read = _stuck_engine(monkeypatch, 64)
    async with _holder(engine) as worker:
        async with _call(worker, _frame(_ours())) as call:
            await call.read()
            await asyncio.to_thread(entered.wait, 20)
        may_read.set()
        await _until_unpinned(worker)
        assert worker.metric("baton_fetch_served_calls_total", outcome="cancelled") == 1


async def test_blocks_stay_pinned_until_a_read_that_cannot_be_stopped_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Context:
        async def write(self, frame: bytes) -> None:
            """Takes everything."""

    engine, entered, may_read = _stuck_engine(monkeypatch, 64)
    async with _holder(engine) as worker:
        call = fetch_call.FetchCall(worker.engine, "a", StreamCarrier(engine.kv_cache), _ours())
        context: Any = Context()
        fetch = asyncio.create_task(call.run(context, engine.hash_chain.hashes(PROMPT, "s", "us")))
        await asyncio.to_thread(entered.wait, 20)
        fetch.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not fetch.done()
        assert await worker.used_blocks() == 11
        may_read.set()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        assert await worker.used_blocks() == 0


async def test_deadline_unpins(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, entered, may_read = _stuck_engine(monkeypatch, 64)
    async with _holder(engine) as worker:
        failing = asyncio.create_task(_fails(worker, _frame(_ours(time_left_s=0.05))))
        await asyncio.to_thread(entered.wait, 20)
        await asyncio.sleep(0.1)
        may_read.set()

        assert (await failing).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await _until_unpinned(worker)


async def test_reader_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _holder(fetch_stall_s=0.05) as worker:
        original = fetch_call._write

        async def stuck(context: Any, frame: bytes, stall_s: float) -> None:
            class Stuck:
                async def write(self, raw: bytes) -> None:
                    await asyncio.Event().wait()

            await original(Stuck(), frame, stall_s)

        monkeypatch.setattr(fetch_call, "_write", stuck)
        error = await _fails(worker, _frame(_ours()))

        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await _until_unpinned(worker)
        assert worker.metric("baton_fetch_served_calls_total", outcome="stalled") == 1


async def test_damaged_block_ends_the_fetch_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(WatchedRun):
        def read_blocks(self, start: int, stop: int) -> memoryview:
            raise ValueError("block file does not match its checksum")

    engine = build_pinning_engine(hides_device=True, run_type=Damaged)
    async with _holder(engine) as worker:
        error = await _fails(worker, _frame(_ours()))

        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "checksum" in (error.details() or "")
        await _until_unpinned(worker)
