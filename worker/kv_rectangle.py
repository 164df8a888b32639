"""Parts of a KV cache that travel: rectangles of layers by blocks, cut and joined to message size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.kv_layout import KvLayout

TARGET_CHUNK_BYTES = 1 << 20  # the fastest gRPC message measured; larger ones are slower again


@dataclass(frozen=True, slots=True)
class KvRectangle:
    """Layers [first_layer, first_layer + num_layers) of consecutive blocks of one sequence."""

    first_layer: int
    num_layers: int
    first_block: int  # index in the sequence
    block_ids: tuple[int, ...]  # where those blocks are in this worker's cache

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    def num_bytes(self, layout: KvLayout) -> int:
        return self.num_layers * self.num_blocks * layout.block_size * layout.token_bytes

    def without_leading(self, num_held_blocks: int) -> KvRectangle | None:
        """What is left of it past the sequence's first num_held_blocks blocks."""
        num_skipped = max(0, num_held_blocks - self.first_block)
        if num_skipped >= self.num_blocks:
            return None
        return replace(
            self, first_block=self.first_block + num_skipped, block_ids=self.block_ids[num_skipped:]
        )

    def joined(self, other: KvRectangle) -> KvRectangle | None:
        """One rectangle that is both, if they touch along a whole side and `other` comes after."""
        same_layers = (self.first_layer, self.num_layers) == (other.first_layer, other.num_layers)
        if same_layers and self.first_block + self.num_blocks == other.first_block:
            return replace(self, block_ids=self.block_ids + other.block_ids)
        same_blocks = (self.first_block, self.block_ids) == (other.first_block, other.block_ids)
        if same_blocks and self.first_layer + self.num_layers == other.first_layer:
            return replace(self, num_layers=self.num_layers + other.num_layers)
        return None

    def pieces(self, layout: KvLayout, max_bytes: int = TARGET_CHUNK_BYTES) -> Iterator[KvRectangle]:
        """Cut into rectangles of at most max_bytes, but never below one block of one layer."""
        block_bytes = layout.block_size * layout.token_bytes
        blocks_per_piece = max(1, max_bytes // block_bytes)
        layers_per_piece = max(1, max_bytes // (block_bytes * min(self.num_blocks, blocks_per_piece)))
        for layer in range(0, self.num_layers, layers_per_piece):
            for block in range(0, self.num_blocks, blocks_per_piece):
                yield KvRectangle(
                    self.first_layer + layer,
                    min(layers_per_piece, self.num_layers - layer),
                    self.first_block + block,
                    self.block_ids[block : block + blocks_per_piece],
                )
