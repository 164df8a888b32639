"""Writes the chunks of one fetch into the blocks of a load, the last blocks first, until compute met them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kv_cache import KvCache
from engine.kv_load import KvLoad
from proto.prefill_pb2 import KvChunk
from worker.cancellation import run_in_thread
from worker.kv_carrier import BytesCarrier, num_chunk_bytes, verified_bytes
from worker.kv_chunks import INLINE_BYTES, ChunkTally


class _Piece(NamedTuple):
    chunk_pb: KvChunk
    payload: memoryview


class LoadReceiver:
    """Raises ValueError, saying what was expected and found, for anything but whole blocks from the last to
    the first one."""

    def __init__(self, load: KvLoad, kv_cache: KvCache, carrier: BytesCarrier) -> None:
        self.tally = ChunkTally()
        self.num_written_blocks = 0
        self._load = load
        self._kv_cache = kv_cache
        self._carrier = carrier
        self._back = load.end_block  # what came is behind it
        self._pieces: list[_Piece] = []  # of blocks of which layers are missing

    @property
    def is_complete(self) -> bool:
        return self._back == self._load.first_block

    async def receive(self, chunk_pb: KvChunk, payload: memoryview) -> bool:
        """False: compute has the rest, nothing more is wanted. Returns, or is cancelled, only when nothing
        writes to the blocks any more; they are then complete, or the load must fail()."""
        self._check(chunk_pb)
        self.tally.add(num_chunk_bytes(chunk_pb, self._kv_cache.layout), chunk_pb.checksum)
        self._pieces.append(_Piece(chunk_pb, payload))
        if chunk_pb.first_layer + chunk_pb.num_layers < self._kv_cache.layout.num_layers:
            return True
        pieces, self._pieces = self._pieces, []
        self._back = chunk_pb.first_block
        claimed = self._load.claim(chunk_pb.first_block)
        if not claimed:
            return False
        num_bytes = sum(num_chunk_bytes(piece.chunk_pb, self._kv_cache.layout) for piece in pieces)
        if num_bytes <= INLINE_BYTES and not self._kv_cache.is_on_device:
            self._write(claimed, pieces)
        else:
            await run_in_thread(self._write, claimed, pieces)
        self.num_written_blocks += len(claimed)
        self._load.complete(claimed)
        return claimed.start == chunk_pb.first_block

    def _check(self, chunk_pb: KvChunk) -> None:
        first = self._pieces[0].chunk_pb if self._pieces else None
        next_layer = 0
        if first is not None:
            last = self._pieces[-1].chunk_pb
            next_layer = last.first_layer + last.num_layers
        blocks = range(chunk_pb.first_block, chunk_pb.first_block + chunk_pb.num_blocks)
        is_next = blocks.stop == self._back and blocks.start >= self._load.first_block and len(blocks) > 0
        is_same = first is None or blocks.start == first.first_block
        num_layers = self._kv_cache.layout.num_layers
        end_layer = chunk_pb.first_layer + chunk_pb.num_layers
        are_layers_next = chunk_pb.first_layer == next_layer < end_layer <= num_layers
        if not (is_next and is_same and are_layers_next):
            raise ValueError(
                f"expected layers from {next_layer} of blocks that end at {self._back} of "
                f"[{self._load.first_block}, {self._load.end_block}), got layers "
                f"[{chunk_pb.first_layer}, {end_layer}) of blocks [{blocks.start}, {blocks.stop})"
            )

    def _write(self, claimed: range, pieces: list[_Piece]) -> None:
        layout = self._kv_cache.layout
        block_ids = self._load.block_ids(claimed)
        contents = [verified_bytes(self._carrier, *piece, layout) for piece in pieces]
        for piece, kv_bytes in zip(pieces, contents, strict=True):
            chunk_pb = piece.chunk_pb
            num_computed = claimed.start - chunk_pb.first_block  # compute took the first ones meanwhile
            if num_computed:
                by_block = np.frombuffer(kv_bytes, dtype=np.uint8)
                by_block = by_block.reshape(chunk_pb.num_layers, chunk_pb.num_blocks, -1)
                kv_bytes = np.ascontiguousarray(by_block[:, num_computed:]).reshape(-1).data
            self._kv_cache.write_blocks(chunk_pb.first_layer, chunk_pb.num_layers, block_ids, kv_bytes)
