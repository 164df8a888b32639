"""Which dtype a model computes in."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """`name` is one of DTYPES, or "auto": bfloat16 where the device multiplies it natively, else float32."""
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _has_native_bfloat16(device: str) -> bool:
    if device != "cpu":
        return True
    # oneDNN reports bfloat16 on any AVX-512 processor, where it is emulated and slower than float32.
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
