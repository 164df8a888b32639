"""The reader's side of a fetch: a KvSource between a real holder and the blocks of a load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.kv_load import KvLoad
from proto.kv_pb2 import FetchFinished, FetchStarted
from proto.link_pb2 import Submit
from proto.prefill_pb2 import KvChunk
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout
from tests.fakes.fake_workers import FakeWorker, decode_worker, greedy_spec, router_link
from tests.fakes.pinning_engine import build_pinning_engine
from worker import fetch_call, load_receiver
from worker.deadline import Deadline
from worker.fetch_limit import FetchLimit
from worker.fetch_rates import FetchRates
from worker.kv_frames import FrameKind, combined_checksum, pack_frame, read_frame, read_header
from worker.kv_service import KvService
from worker.peer_source import PeerSource

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]  # 11 full blocks of 4
LAYOUT = fake_kv_layout()
TARGETS = list(range(40, 51))  # where the reader wants them

Tamper = Callable[[FrameKind, bytes], Iterator[bytes]]


@asynccontextmanager
async def _pair(
    *, is_shared: bool = False, host_id: str = "that", **facts: Any
) -> AsyncIterator[tuple[FakeWorker, FakeWorker]]:
    """A holder of PROMPT's blocks, and a reader without any."""
    limit = FetchLimit(1 << 10)
    async with (
        decode_worker(
            build_pinning_engine(is_shared=is_shared), worker_id="holder", host_id=host_id, fetch_limit=limit
        ) as holder,
        decode_worker(
            build_fake_engine(), worker_id="reader", host_id="that", accepts_shared_memory=is_shared, **facts
        ) as reader,
    ):
        async with router_link(holder) as router:
            assert (await router.finish(greedy_spec(PROMPT, 1))).token_ids == expected_tokens(PROMPT, 1)
        await holder.until_idle()
        yield holder, reader
        await _until_unpinned(holder)


async def _until_unpinned(holder: FakeWorker) -> None:
    async with asyncio.timeout(10):
        while holder.kv_service.limit.num_fetches:
            await holder.engine.call(lambda engine: None)
    assert await holder.used_blocks() == 0


class _Fetch:
    """A load, and the source that brings it."""

    def __init__(self, reader: FakeWorker, source: PeerSource, first_block: int, num_blocks: int) -> None:
        self.source = source
        self.reader = reader
        self.changes = 0
        self.changed = asyncio.Event()
        self.load = KvLoad(first_block, TARGETS[first_block : first_block + num_blocks], self._on_change)

    def _on_change(self) -> None:
        self.changes += 1
        self.changed.set()

    async def run(self) -> None:
        """Until the fetch has ended."""
        self.source.start(self.load)
        await self.reader.engine.call(lambda engine: None)  # start() takes a trip through the loop
        async with asyncio.timeout(20):
            while self.reader.fetcher.num_running:
                await self.reader.engine.call(lambda engine: None)


@asynccontextmanager
async def _fetch(
    reader: FakeWorker, holder: FakeWorker, first_block: int = 0, num_blocks: int = 11, **fields: Any
) -> AsyncIterator[_Fetch]:
    submit = Submit(sequence=greedy_spec(PROMPT, 4, **fields), peer=holder.as_peer(11))
    with reader.fetcher.offered(submit, Deadline(0)) as source:
        assert source is not None
        yield _Fetch(reader, source, first_block, num_blocks)


def _read(reader: FakeWorker, first_block: int, num_blocks: int) -> bytes:
    cache = reader.engine.engine.kv_cache
    return bytes(cache.read_blocks(0, 3, TARGETS[first_block : first_block + num_blocks]))


def _truth(holder: FakeWorker, first_block: int, num_blocks: int) -> bytes:
    engine = holder.engine.engine
    block_ids = engine._pool.lookup(engine.hash_chain.hashes(PROMPT))
    return bytes(engine.kv_cache.read_blocks(0, 3, block_ids[first_block : first_block + num_blocks]))


def _outcome(reader: FakeWorker, outcome: str) -> float:
    return reader.metric("baton_fetch_calls_total", outcome=outcome)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks a message."""
    monkeypatch.setattr(fetch_call, "TARGET_CHUNK_BYTES", 4 * LAYOUT.block_bytes)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
async def test_blocks_of_a_peer_are_those_of_the_peer(
    is_shared: bool, inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_receiver, "INLINE_BYTES", inline_bytes)
    async with _pair(is_shared=is_shared) as (holder, reader), _fetch(reader, holder, 2, 9) as fetch:
        await fetch.run()

        assert fetch.load.failure is None
        assert fetch.load.is_met
        assert fetch.load.num_loaded_blocks == 9
        assert _read(reader, 2, 9) == _truth(holder, 2, 9)
        assert not any(_read(reader, 0, 2))
        assert _outcome(reader, "finished") == 1
        assert reader.metric("baton_fetch_blocks_total") == 9
        carrier = "shared_memory" if is_shared else "stream"
        received = reader.metric("baton_fetch_received_bytes_total", carrier=carrier)
        assert received == 9 * LAYOUT.block_bytes
        assert reader.fetcher.rates.bytes_per_s > 0


async def test_block_larger_than_a_message_comes_in_groups_of_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from worker.kv_rectangle import KvRectangle

    layer_bytes = LAYOUT.block_bytes // LAYOUT.num_layers
    cut = KvRectangle.pieces
    monkeypatch.setattr(fetch_call, "TARGET_CHUNK_BYTES", 1)
    monkeypatch.setattr(KvRectangle, "pieces", lambda self, layout: cut(self, layout, 2 * layer_bytes))
    async with _pair() as (holder, reader), _fetch(reader, holder) as fetch:
        await fetch.run()

        assert fetch.load.failure is None
        assert _read(reader, 0, 11) == _truth(holder, 0, 11)


@pytest.mark.usefixtures("small_chunks")
async def test_fetch_ends_where_compute_has_come_and_writes_nothing_there() -> None:
    async with _pair() as (holder, reader), _fetch(reader, holder) as fetch:
        assert fetch.load.advance(5) == 5
        await fetch.run()

        assert fetch.load.is_met
        assert fetch.load.num_loaded_blocks == 6
        assert _read(reader, 5, 6) == _truth(holder, 5, 6)
        assert not any(_read(reader, 0, 5))
        assert _outcome(reader, "met") == 1


async def test_peer_with_fewer_blocks_makes_the_load_shorter() -> None:
    async with _pair() as (holder, reader):
        holder.kv_service.limit._max_pinned_blocks = 7
        async with _fetch(reader, holder) as fetch:
            await fetch.run()

            assert (fetch.load.failure, fetch.load.end_block) == (None, 7)
            assert fetch.load.is_met
            assert _read(reader, 0, 7) == _truth(holder, 0, 7)
            assert _outcome(reader, "short") == 1


@pytest.mark.parametrize("fields", [{"tenant": "other"}, {"cache_salt": "other"}])
async def test_peer_without_the_blocks_fails_the_load(fields: dict[str, str]) -> None:
    async with _pair() as (holder, reader), _fetch(reader, holder, **fields) as fetch:
        await fetch.run()

        assert fetch.load.failure == "the peer has none of the blocks any more"
        assert not any(_read(reader, 0, 11))
        assert _outcome(reader, "missed") == 1


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
    honest = KvService.fetch

    async def fetch(self: KvService, requests: object, context: Any) -> None:
        await honest(self, requests, _TamperedContext(context, tamper))

    monkeypatch.setattr(KvService, "fetch", fetch)


def _changed(kind: FrameKind, header_type: type[Any], change: Callable[[Any], None]) -> Tamper:
    def tamper(found: FrameKind, raw: bytes) -> Iterator[bytes]:
        if found is not kind:
            yield raw
            return
        frame = read_frame(raw)
        header = read_header(frame, kind, header_type)
        change(header)
        yield pack_frame(kind, header, frame.payload)

    return tamper


def _flip_a_bit_of_the_second_chunk() -> Tamper:
    chunks = iter(range(100))

    def tamper(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
        if kind is FrameKind.KV_CHUNK and next(chunks) == 1:
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        yield raw

    return tamper


def _repeat_chunks(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    yield raw
    if kind is FrameKind.KV_CHUNK:
        yield raw


def _drop_chunks(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is not FrameKind.KV_CHUNK:
        yield raw


def _drop_chunks_and_their_count(kind: FrameKind, raw: bytes) -> Iterator[bytes]:
    if kind is FrameKind.FETCH_FINISHED:
        raw = pack_frame(kind, FetchFinished(checksum=combined_checksum([])))
    if kind is not FrameKind.KV_CHUNK:
        yield raw


def _more_blocks(started: FetchStarted) -> None:
    started.num_blocks += 1


def _unasked_memory(started: FetchStarted) -> None:
    started.shared_kv_cache.num_blocks = 1


def _first_layer(chunk: KvChunk) -> None:
    chunk.first_layer += 1


def _other_block(chunk: KvChunk) -> None:
    chunk.first_block -= 1


def _no_blocks(chunk: KvChunk) -> None:
    chunk.num_blocks = 0


def _source_blocks(chunk: KvChunk) -> None:
    chunk.source_block_ids.extend(range(chunk.num_blocks))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "tamper",
    [
        _flip_a_bit_of_the_second_chunk(),
        _repeat_chunks,
        _drop_chunks,
        _drop_chunks_and_their_count,
        _changed(FrameKind.FETCH_STARTED, FetchStarted, _more_blocks),
        _changed(FrameKind.FETCH_STARTED, FetchStarted, _unasked_memory),
        _changed(FrameKind.KV_CHUNK, KvChunk, _first_layer),
        _changed(FrameKind.KV_CHUNK, KvChunk, _other_block),
        _changed(FrameKind.KV_CHUNK, KvChunk, _no_blocks),
        _changed(FrameKind.KV_CHUNK, KvChunk, _source_blocks),
    ],
)
async def test_peer_that_lies_fails_the_load_and_wrong_bytes_are_never_loaded(
    tamper: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tamper_with(monkeypatch, tamper)
    async with _pair() as (holder, reader), _fetch(reader, holder) as fetch:
        await fetch.run()

        assert fetch.load.failure
        assert _outcome(reader, "corrupt") == 1
        num_good = fetch.load.num_loaded_blocks
        assert num_good <= 4
        assert _read(reader, 11 - num_good, num_good) == _truth(holder, 11 - num_good, num_good)
        # Compute can take everything else: nothing is claimed any more.
        assert fetch.load.advance(11) == 11 - num_good
        assert fetch.load.is_met


async def test_peer_that_is_dead_fails_the_load_at_once() -> None:
    async with _pair() as (holder, reader):
        assert holder.server is not None
        await holder.server.stop(0)
        async with _fetch(reader, holder) as fetch:
            await fetch.run()

            assert fetch.load.failure
            assert _outcome(reader, "lost") == 1


@pytest.mark.usefixtures("small_chunks")
async def test_peer_that_makes_no_progress_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fetch_call._write

    async def stop_after_started(context: Any, frame: bytes, stall_s: float) -> None:
        if read_frame(frame).kind != FrameKind.FETCH_STARTED:
            await asyncio.Event().wait()
        await honest(context, frame, stall_s)

    monkeypatch.setattr(fetch_call, "_write", stop_after_started)
    async with _pair(fetch_progress_s=0.05) as (holder, reader), _fetch(reader, holder) as fetch:
        await fetch.run()

        assert fetch.load.failure == "no progress for 0.05 s"
        assert _outcome(reader, "stalled") == 1
        assert fetch.load.advance(11) == 11


@pytest.mark.parametrize("begins", [False, True])
async def test_sequence_that_ends_closes_its_fetch(begins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    began = asyncio.Event()

    async def hang(context: Any, frame: bytes, stall_s: float) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(fetch_call, "_write", hang)
    async with _pair() as (holder, reader):
        async with _fetch(reader, holder) as fetch:
            fetch.source.start(fetch.load)
            if begins:
                await began.wait()
        await fetch.changed.wait()

        assert fetch.load.failure in ("cancelled", "the sequence has ended")
        async with asyncio.timeout(10):
            while reader.fetcher.num_running:
                await reader.engine.call(lambda engine: None)


async def test_worker_that_refuses_fails_the_load() -> None:
    async with _pair() as (holder, reader):
        holder.kv_service.limit._max_fetches = 0
        async with _fetch(reader, holder) as fetch:
            await fetch.run()

            assert "already" in (fetch.load.failure or "")
            assert _outcome(reader, "refused") == 1


async def test_worker_does_not_fetch_from_itself_or_from_nobody() -> None:
    async with _pair() as (holder, reader):
        for peer in (reader.as_peer(11), holder.as_peer(0), None):
            submit = Submit(sequence=greedy_spec(PROMPT, 4), peer=peer)
            with reader.fetcher.offered(submit, Deadline(0)) as source:
                assert source is None


async def test_source_has_no_more_blocks_than_the_sequence() -> None:
    async with _pair() as (holder, reader):
        submit = Submit(sequence=greedy_spec(PROMPT, 4), peer=holder.as_peer(1000))
        with reader.fetcher.offered(submit, Deadline(0)) as source:
            assert source is not None
            assert source.num_blocks == 11


def test_estimate_follows_what_was_measured() -> None:
    rates = FetchRates()
    assert rates.bytes_per_s == 0
    before = rates.estimate_s(1 << 20)
    for _ in range(50):
        rates.observe(1 << 20, latency_s=0.5, transfer_s=2.0)

    assert rates.estimate_s(1 << 20) == pytest.approx(2.5, rel=0.01)
    assert rates.estimate_s(1 << 20) > before
