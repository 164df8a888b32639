"""What both ends of a transfer do with its chunks: count them, and verify the count."""

from __future__ import annotations

from proto.kv_pb2 import FetchFinished
from proto.prefill_pb2 import PrefillFinished
from worker.kv_frames import combined_checksum

INLINE_BYTES = 256 << 10  # copying more than this takes longer than a trip to a thread and back


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
