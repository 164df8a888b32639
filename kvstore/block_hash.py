"""Content hashes of KV blocks, chained over the prefix.

Equal hash means: same model, same cache layout, same tenant salt, same tokens from the first one on. The
router hashes prompts with this module and workers hash sequences with it, so a hash never has to be
translated.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

HASH_SCHEME = "blake2b-128-u32le-v2"
HASH_SIZE_BYTES = 16


class BlockTier(enum.IntEnum):
    """Where a worker keeps a block, fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HashChain:
    """The parameters that two processes must share for their hashes to mean the same."""

    model_fingerprint: str
    block_size: int  # tokens

    def root(self, cache_salt: str = "", tenant: str = "") -> BlockHash:
        """The parent of the first block of every sequence of this tenant with this salt."""
        parts = (HASH_SCHEME, self.model_fingerprint, str(self.block_size), tenant, cache_salt)
        # Length prefixes: ("ab", "c") and ("a", "bc") must not collide.
        framed = b"".join(len(raw).to_bytes(4, "little") + raw for raw in (part.encode() for part in parts))
        return BlockHash(blake2b(framed, digest_size=HASH_SIZE_BYTES).digest())

    def child(self, parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
        """Hash of one full block that follows `parent`."""
        assert len(token_ids) == self.block_size
        return BlockHash(blake2b(parent + _token_bytes(token_ids), digest_size=HASH_SIZE_BYTES).digest())

    def hashes(self, token_ids: Sequence[int], cache_salt: str = "", tenant: str = "") -> list[BlockHash]:
        """Hashes of the full blocks of `token_ids`, first block first; a partial last block has none."""
        raw = _token_bytes(token_ids)
        stride = self.block_size * 4
        parent = self.root(cache_salt, tenant)
        empty = blake2b(digest_size=HASH_SIZE_BYTES)  # a copy costs a third less than a new one
        result = []
        for start in range(0, len(raw) - stride + 1, stride):
            block = empty.copy()
            block.update(parent + raw[start : start + stride])
            parent = BlockHash(block.digest())
            result.append(parent)
        return result


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    assert packed.itemsize == 4
    return packed.tobytes()
