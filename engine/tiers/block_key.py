"""A block outside the device: its content hash and its place in the tree of prefixes."""

from __future__ import annotations

from typing import NamedTuple

from kvstore.block_hash import BlockHash


class BlockKey(NamedTuple):
    block_hash: BlockHash
    parent: BlockHash  # of the block before it; of the first block: the chain's root
    depth: int  # blocks before it
