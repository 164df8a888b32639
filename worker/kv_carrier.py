"""How the bytes of KV chunks travel: inside the stream, through a shared memory object of the host, or not at
all, because the receiver copies them from the sender's own cache.

Both sides of one call use the same carrier; the sender chooses it in its STARTED frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.kv_cache import AttachedKvCache, KvCache, PeerKvCache
from engine.kv_layout import KvLayout
from proto.prefill_pb2 import KvChunk, SharedKvCache
from worker.kv_frames import FrameKind, checksum, checksum_of, pack_frame
from worker.kv_rectangle import TARGET_CHUNK_BYTES, KvRectangle

if TYPE_CHECKING:
    import torch

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

    @property
    def has_checksums(self) -> bool:
        """False: nothing in a chunk tells whether its bytes are what was sent."""
        ...

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        """Sending side: reads the cache now, so the blocks must be final and owned until the call ends."""
        ...

    def write(
        self,
        chunk_pb: KvChunk,
        payload: memoryview,
        target: KvCache,
        block_ids: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        """Receiving side: what the chunk holds goes to these blocks, behind `after`. ValueError when it is
        not what the header says."""
        ...


class BytesCarrier(KvCarrier, Protocol):
    """Its bytes pass through host memory."""

    def unpack(self, chunk_pb: KvChunk, payload: memoryview, landing: memoryview | None = None) -> memoryview:
        """Receiving side: the chunk's bytes, neither size nor checksum verified, in `landing` if they have
        to be copied and fit exactly. ValueError when the header makes no sense to this carrier."""
        ...


class StreamCarrier:
    """Bytes follow the chunk's header in the frame."""

    name = "stream"
    max_chunk_bytes = TARGET_CHUNK_BYTES
    has_checksums = True

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        return pack_bytes(rectangle, _read(self._source, rectangle))

    def write(
        self,
        chunk_pb: KvChunk,
        payload: memoryview,
        target: KvCache,
        block_ids: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        _write_bytes(self, chunk_pb, payload, target, block_ids, after)

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
    has_checksums = True

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

    def write(
        self,
        chunk_pb: KvChunk,
        payload: memoryview,
        target: KvCache,
        block_ids: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        _write_bytes(self, chunk_pb, payload, target, block_ids, after)

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
        _check_source(block_ids, source.num_blocks)
        return source.read_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids, landing)


class MappedCacheCarrier:
    """The frame says where the bytes are in the sender's cache, which the receiver has mapped. No processor
    sees them, so there is no checksum of them."""

    name = "device_memory"
    max_chunk_bytes = SHARED_CHUNK_BYTES
    has_checksums = False

    def __init__(self, source: KvCache | PeerKvCache) -> None:
        self._source = source

    def pack(self, rectangle: KvRectangle) -> PackedChunk:
        chunk_pb = _header(rectangle, 0)
        chunk_pb.source_block_ids.extend(rectangle.block_ids)
        num_bytes = rectangle.num_bytes(self._source.layout)
        return PackedChunk(pack_frame(FrameKind.KV_CHUNK, chunk_pb), num_bytes, 0)

    def write(
        self,
        chunk_pb: KvChunk,
        payload: memoryview,
        target: KvCache,
        block_ids: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        source_ids = list(chunk_pb.source_block_ids)
        if payload or len(source_ids) != chunk_pb.num_blocks or chunk_pb.checksum:
            raise ValueError(
                f"expected {chunk_pb.num_blocks} source blocks, no payload and no checksum, "
                f"got {len(source_ids)} and {len(payload)} bytes"
            )
        _check_source(source_ids, self._source.num_blocks)
        first_layer, num_layers = chunk_pb.first_layer, chunk_pb.num_layers
        target.copy_blocks(self._source, first_layer, num_layers, source_ids, block_ids, after)


def sending_carrier(kv_cache: KvCache, host: KvCache | None = None, *, is_shared: bool) -> BytesCarrier:
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


def num_chunk_bytes(chunk_pb: KvChunk, layout: KvLayout) -> int:
    return chunk_pb.num_layers * chunk_pb.num_blocks * layout.block_size * layout.token_bytes


def verified_bytes(
    carrier: BytesCarrier,
    chunk_pb: KvChunk,
    payload: memoryview,
    layout: KvLayout,
    landing: memoryview | None = None,
) -> memoryview:
    """[layer][block][token in block][token_shape]. ValueError when size or checksum is wrong."""
    kv_bytes = carrier.unpack(chunk_pb, payload, landing)
    expected = num_chunk_bytes(chunk_pb, layout)
    if len(kv_bytes) != expected:
        raise ValueError(f"expected {expected} bytes, got {len(kv_bytes)}")
    if checksum(kv_bytes) != chunk_pb.checksum:
        raise ValueError(
            f"checksum of layer {chunk_pb.first_layer}, block {chunk_pb.first_block} does not match"
        )
    return kv_bytes


def _write_bytes(
    carrier: BytesCarrier,
    chunk_pb: KvChunk,
    payload: memoryview,
    target: KvCache,
    block_ids: list[int],
    after: torch.cuda.Event | None,
) -> None:
    with target.landing(num_chunk_bytes(chunk_pb, target.layout)) as landing:
        kv_bytes = verified_bytes(carrier, chunk_pb, payload, target.layout, landing)
        target.write_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids, kv_bytes, after)


def _check_source(block_ids: list[int], num_blocks: int) -> None:
    if max(block_ids) >= num_blocks:
        raise ValueError(f"source block {max(block_ids)} is outside a cache of {num_blocks}")


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
