"""How the bytes of KV chunks travel: inside the stream, or through a shared memory object of the host.

Both sides of one hand-off use the same carrier; the prefill worker chooses it in PREFILL_STARTED.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.kv_cache import AttachedKvCache, KvCache
from proto.prefill_pb2 import KvChunk
from worker.kv_rectangle import KvRectangle
from worker.prefill_frames import FrameKind, checksum, pack_frame

BlockSource = KvCache | AttachedKvCache


class PackedChunk(NamedTuple):
    frame: bytes
    num_bytes: int  # of KV, wherever they are
    checksum: int


class KvCarrier(Protocol):
    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        """Sending side: reads the cache now, so the blocks must be final and owned until the call ends."""
        ...

    def unpack(self, chunk_pb: KvChunk, payload: memoryview) -> memoryview:
        """Receiving side: the chunk's bytes, neither size nor checksum verified. ValueError when the header
        makes no sense to this carrier."""
        ...


class StreamCarrier:
    """Bytes follow the chunk's header in the frame."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        payload = _read(self._source, rectangle)
        chunk_pb = _header(rectangle, payload)
        return PackedChunk(pack_frame(FrameKind.KV_CHUNK, chunk_pb, payload), len(payload), chunk_pb.checksum)

    def unpack(self, chunk_pb: KvChunk, payload: memoryview) -> memoryview:
        if chunk_pb.source_block_ids:
            raise ValueError("a chunk of a stream names source blocks")
        return payload


class SharedMemoryCarrier:
    """The frame says where the bytes are in the prefill worker's cache; both sides read it as `source`."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        payload = _read(self._source, rectangle)
        chunk_pb = _header(rectangle, payload)
        chunk_pb.source_block_ids.extend(rectangle.block_ids)
        return PackedChunk(pack_frame(FrameKind.KV_CHUNK, chunk_pb), len(payload), chunk_pb.checksum)

    def unpack(self, chunk_pb: KvChunk, payload: memoryview) -> memoryview:
        block_ids = list(chunk_pb.source_block_ids)
        if payload or len(block_ids) != chunk_pb.num_blocks:
            raise ValueError(
                f"expected {chunk_pb.num_blocks} source blocks and no payload, "
                f"got {len(block_ids)} and {len(payload)} bytes"
            )
        if block_ids and max(block_ids) >= self._source.num_blocks:
            raise ValueError(f"source block {max(block_ids)} is outside a cache of {self._source.num_blocks}")
        return self._source.read_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids)


def _read(source: BlockSource, rectangle: KvRectangle) -> memoryview:
    return source.read_blocks(rectangle.first_layer, rectangle.num_layers, list(rectangle.block_ids))


def _header(rectangle: KvRectangle, payload: memoryview) -> KvChunk:
    return KvChunk(
        first_layer=rectangle.first_layer,
        num_layers=rectangle.num_layers,
        first_block=rectangle.first_block,
        num_blocks=rectangle.num_blocks,
        checksum=checksum(payload),
    )
