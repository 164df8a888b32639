"""What a KV cache looks like. Two workers may hand blocks over only if their layouts are equal."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from hashlib import blake2b

# "fp8": rows of bytes, as engine/kernels/mla_fp8_rows.py has them.
_DTYPE_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    model_fingerprint: str  # equal weights in equal dtype give equal cache contents
    num_layers: int
    token_shape: tuple[int, ...]  # of one token in one layer: (576,) for MLA, (2, kv_heads, head_dim) for GQA
    dtype: str
    block_size: int  # tokens

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_SIZES:
            raise ValueError(f"KV dtype must be one of {sorted(_DTYPE_SIZES)}, got {self.dtype!r}")

    @property
    def fingerprint(self) -> str:
        return blake2b(repr(sorted(asdict(self).items())).encode(), digest_size=8).hexdigest()

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer."""
        return math.prod(self.token_shape) * _DTYPE_SIZES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Of one block over all layers."""
        return self.num_layers * self.block_size * self.token_bytes

    def difference(self, other: KvLayout) -> str | None:
        """None when equal, else the fields that differ, for an error message."""
        mine, theirs = asdict(self), asdict(other)
        differing = [
            f"{name}: {mine[name]!r} != {theirs[name]!r}" for name in mine if mine[name] != theirs[name]
        ]
        return "; ".join(differing) or None
