"""Small arrays on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def upload(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """To a CUDA device by way of page-locked memory: the host does not wait for what is launched there, and
    `values` may change at once. On the CPU a view of them."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host
    return host.contiguous().pin_memory().to(device, non_blocking=True)
