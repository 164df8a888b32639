"""Where the Triton kernels run: on CUDA devices that have Triton, and under its interpreter in tests."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def has_kernels(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
