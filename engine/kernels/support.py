"""Where the Triton kernels run: on CUDA devices that have Triton, and under its interpreter in tests."""

from __future__ import annotations

import importlib.util

import torch


def has_kernels(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
