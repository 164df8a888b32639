"""Memory that CUDA copies from and to by itself, where it is not torch's own (torch has pin_memory)."""

from __future__ import annotations

import contextlib

import torch

_CUDA_SUCCESS = 0


def pin(memory: torch.Tensor) -> bool:
    """Page-locks it, until unpin(). False when the driver refuses: copies work all the same, slower."""
    refused = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != _CUDA_SUCCESS
    if refused:
        # The error would be taken for the next launch's: one launch picks it up.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
    return not refused


def unpin(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
