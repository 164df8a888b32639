from __future__ import annotations

import asyncio
import threading

import pytest

from decode_svc.chunk_receiver import ChunkReceiver
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from proto.prefill_pb2 import KvChunk, PrefillFinished
from tests.fakes.fake_model import fake_kv_layout
from worker.kv_carrier import StreamCarrier
from worker.kv_frames import checksum, combined_checksum

LAYOUT = fake_kv_layout()  # 3 layers


def _chunk(
    first_layer: int, num_layers: int, first_block: int, num_blocks: int, fill: int = 7
) -> tuple[KvChunk, memoryview]:
    payload = bytes([fill]) * (num_layers * num_blocks * LAYOUT.block_size * LAYOUT.token_bytes)
    chunk = KvChunk(
        first_layer=first_layer,
        num_layers=num_layers,
        first_block=first_block,
        num_blocks=num_blocks,
        checksum=checksum(payload),
    )
    return chunk, memoryview(payload)


def _finished(*chunks: tuple[KvChunk, memoryview]) -> PrefillFinished:
    return PrefillFinished(
        num_chunks=len(chunks),
        num_bytes=sum(len(payload) for _, payload in chunks),
        checksum=combined_checksum([chunk.checksum for chunk, _ in chunks]),
    )


def _receiver(cache: KvCache, num_held_blocks: int = 0) -> ChunkReceiver:
    return ChunkReceiver(cache, StreamCarrier(cache), [5, 3, 9], num_held_blocks)


async def test_chunks_that_cover_everything_are_written_where_they_belong() -> None:
    cache = KvCache(LAYOUT, 10)
    receiver = _receiver(cache)
    chunks = [_chunk(0, 2, 0, 3, 1), _chunk(2, 1, 0, 1, 2), _chunk(2, 1, 1, 2, 3)]
    for chunk, payload in chunks:
        await receiver.receive(chunk, payload)

    receiver.verify_finished(_finished(*chunks))
    assert bytes(cache.read_blocks(0, 2, [5, 3, 9])) == bytes(chunks[0][1])
    assert bytes(cache.read_blocks(2, 1, [3, 9])) == bytes(chunks[2][1])
    assert not any(cache.read_blocks(0, 3, [0, 1, 2, 4, 6, 7, 8]))


async def test_block_that_came_before_is_refused_and_not_overwritten() -> None:
    cache = KvCache(LAYOUT, 10)
    receiver = _receiver(cache)
    await receiver.receive(*_chunk(0, 3, 0, 2, 1))

    with pytest.raises(ValueError, match="came before"):
        await receiver.receive(*_chunk(1, 1, 1, 2, 2))
    assert set(cache.read_blocks(0, 3, [5, 3])) == {1}


async def test_block_that_is_held_is_never_written() -> None:
    cache = KvCache(LAYOUT, 10)
    receiver = _receiver(cache, num_held_blocks=1)

    with pytest.raises(ValueError, match="held"):
        await receiver.receive(*_chunk(0, 3, 0, 3))
    assert not any(cache.read_blocks(0, 3, [5, 3, 9]))


async def test_missing_block_is_found_at_the_end() -> None:
    receiver = _receiver(KvCache(LAYOUT, 10))
    chunk = _chunk(0, 3, 0, 2)
    await receiver.receive(*chunk)

    with pytest.raises(ValueError, match="3 of 9"):
        receiver.verify_finished(_finished(chunk))


async def test_cancelled_receiver_has_stopped_writing() -> None:
    layout = KvLayout(
        model_fingerprint="f", num_layers=1, token_shape=(1 << 17,), dtype="float32", block_size=1
    )
    entered, may_write = threading.Event(), threading.Event()

    class SlowCache(KvCache):
        def write_blocks(self, *arguments: object) -> None:
            entered.set()
            assert may_write.wait(20)
            super().write_blocks(*arguments)  # type: ignore[arg-type]

    cache = SlowCache(layout, 1)
    payload = memoryview(b"\7" * (512 << 10))
    chunk = KvChunk(num_layers=1, num_blocks=1, checksum=checksum(payload))
    receiving = asyncio.create_task(
        ChunkReceiver(cache, StreamCarrier(cache), [0], 0).receive(chunk, payload)
    )
    await asyncio.to_thread(entered.wait, 20)
    receiving.cancel()
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.sleep(0)
    assert not receiving.done()

    may_write.set()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert set(cache.read_blocks(0, 1, [0])) == {7}
