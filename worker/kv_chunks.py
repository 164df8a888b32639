"""What both ends of a transfer do with its chunks: count them, and verify what came."""

from __future__ import annotations

from engine.kv_layout import KvLayout
from proto.kv_pb2 import FetchFinished
from proto.prefill_pb2 import KvChunk, PrefillFinished
from worker.kv_carrier import KvCarrier
from worker.kv_frames import checksum, combined_checksum

# Copying more than this takes longer than a trip to a thread and back.
INLINE_BYTES = 256 << 10


class ChunkTally:
    """Chunks sent or received on one call, in order."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._checksums: list[int] = []

    @property
    def num_chunks(self) -> int:
        return len(self._checksums)

    @property
    def checksum(self) -> int:
        return combined_checksum(self._checksums)

    def add(self, num_bytes: int, chunk_checksum: int) -> None:
        self.num_bytes += num_bytes
        self._checksums.append(chunk_checksum)

    def verify(self, finished_pb: PrefillFinished | FetchFinished) -> None:
        """ValueError when the other side counted something else."""
        if (self.num_chunks, self.num_bytes) != (finished_pb.num_chunks, finished_pb.num_bytes):
            raise ValueError(
                f"expected {finished_pb.num_chunks} chunks of {finished_pb.num_bytes} bytes together, "
                f"got {self.num_chunks} of {self.num_bytes}"
            )
        if self.checksum != finished_pb.checksum:
            raise ValueError("the combined checksum does not match the chunks")


def num_chunk_bytes(chunk_pb: KvChunk, layout: KvLayout) -> int:
    return chunk_pb.num_layers * chunk_pb.num_blocks * layout.block_size * layout.token_bytes


def verified_bytes(
    carrier: KvCarrier,
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
