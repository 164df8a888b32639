"""How the bytes of KV chunks travel: inside the stream, or through a shared memory object of the host.

Both sides of one call use the same carrier; the sender chooses it in its STARTED frame.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.kv_cache import AttachedKvCache, KvCache
from proto.prefill_pb2 import KvChunk, SharedKvCache
from worker.kv_frames import FrameKind, checksum, checksum_of, pack_frame
from worker.kv_rectangle import TARGET_CHUNK_BYTES, KvRectangle

SHARED_CHUNK_BYTES = 8 << 20  # nothing of it is in the message

BlockSource = KvCache | AttachedKvCache


class PackedChunk(NamedTuple):
    frame: bytes
    num_bytes: int  # of KV, wherever they are
    checksum: int


class KvCarrier(Protocol):
    @property
    def name(self) -> str:
        """For metrics."""
        ...

    @property
    def max_chunk_bytes(self) -> int:
        """Larger rectangles are cut."""
        ...

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        """Sending side: reads the cache now, so the blocks must be final and owned until the call ends."""
        ...

    def unpack(self, chunk_pb: KvChunk, payload: memoryview, landing: memoryview | None = None) -> memoryview:
        """Receiving side: the chunk's bytes, neither size nor checksum verified, in `landing` if they have
        to be copied and fit exactly. ValueError when the header makes no sense to this carrier."""
        ...


class StreamCarrier:
    """Bytes follow the chunk's header in the frame."""

    name = "stream"
    max_chunk_bytes = TARGET_CHUNK_BYTES

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        return pack_bytes(rectangle, _read(self._source, rectangle))

    def unpack(self, chunk_pb: KvChunk, payload: memoryview, landing: memoryview | None = None) -> memoryview:
        if chunk_pb.source_block_ids:
            raise ValueError("a chunk of a stream names source blocks")
        return payload


class SharedMemoryCarrier:
    """The frame says where the bytes are in the sender's cache, or in its host memory where that is shared
    too; both sides read these as `source` and `host`. Bytes that are elsewhere follow in the frame all the
    same."""

    name = "shared_memory"
    max_chunk_bytes = SHARED_CHUNK_BYTES

    def __init__(self, source: BlockSource, host: BlockSource | None = None) -> None:
        self._source = source
        self._host = host

    @property
    def shares_host_memory(self) -> bool:
        return self._host is not None

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        return _pack_place(self._source, rectangle)

    def pack_host(self, rectangle: KvRectangle) -> PackedChunk:
        """Its block ids are slots of the host memory."""
        assert self._host is not None
        return _pack_place(self._host, rectangle, is_in_host_memory=True)

    def unpack(self, chunk_pb: KvChunk, payload: memoryview, landing: memoryview | None = None) -> memoryview:
        block_ids = list(chunk_pb.source_block_ids)
        if not block_ids:
            return payload
        if payload or len(block_ids) != chunk_pb.num_blocks:
            raise ValueError(
                f"expected {chunk_pb.num_blocks} source blocks and no payload, "
                f"got {len(block_ids)} and {len(payload)} bytes"
            )
        source = self._host if chunk_pb.is_in_host_memory else self._source
        if source is None:
            raise ValueError("source blocks in host memory that was not offered")
        if max(block_ids) >= source.num_blocks:
            raise ValueError(f"source block {max(block_ids)} is outside a cache of {source.num_blocks}")
        return source.read_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids, landing)


def sending_carrier(kv_cache: KvCache, host: KvCache | None = None, *, is_shared: bool) -> KvCarrier:
    """is_shared: the receiver can and wants to read this worker's cache, and its host memory, by itself."""
    if is_shared and kv_cache.shared_name is not None:
        return SharedMemoryCarrier(kv_cache, host if host is not None and host.shared_name else None)
    return StreamCarrier(kv_cache)


def shared_cache_pb(kv_cache: KvCache) -> SharedKvCache:
    return SharedKvCache(
        name=kv_cache.shared_name, size_bytes=kv_cache.size_bytes, num_blocks=kv_cache.num_blocks
    )


def pack_bytes(rectangle: KvRectangle, payload: memoryview) -> PackedChunk:
    """A chunk that carries its bytes, wherever they are from; its block ids do not matter."""
    chunk_pb = _header(rectangle, checksum(payload))
    return PackedChunk(pack_frame(FrameKind.KV_CHUNK, chunk_pb, payload), len(payload), chunk_pb.checksum)


def _pack_place(
    source: BlockSource, rectangle: KvRectangle, *, is_in_host_memory: bool = False
) -> PackedChunk:
    block_ids = list(rectangle.block_ids)
    num_bytes, found = checksum_of(source.views(rectangle.first_layer, rectangle.num_layers, block_ids))
    chunk_pb = _header(rectangle, found)
    chunk_pb.source_block_ids.extend(block_ids)
    chunk_pb.is_in_host_memory = is_in_host_memory
    return PackedChunk(pack_frame(FrameKind.KV_CHUNK, chunk_pb), num_bytes, found)


def _read(source: BlockSource, rectangle: KvRectangle) -> memoryview:
    return source.read_blocks(rectangle.first_layer, rectangle.num_layers, list(rectangle.block_ids))


def _header(rectangle: KvRectangle, found_checksum: int) -> KvChunk:
    return KvChunk(
        first_layer=rectangle.first_layer,
        num_layers=rectangle.num_layers,
        first_block=rectangle.first_block,
        num_blocks=rectangle.num_blocks,
        checksum=found_checksum,
    )
