"""Where the expert products of many rows run in warps with roles (engine/kernels/moe_specialised.py): FP8
experts and bf16 tokens on Hopper, if the Triton at hand has the language and gets the numbers right.

Gluon, the language, changes between releases of Triton. So the first layer of a process that would use it
multiplies a few rows by made-up experts, which also compiles the kernel for all layers.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from engine.checkpoint import fp8
from engine.checkpoint.fp8 import FP8_GROUP
from engine.kernels.moe_choice import Choice
from engine.kernels.moe_gate import GateSpec
from engine.kernels.moe_gemm import ExpertWeights
from engine.kernels.moe_tiles import SpecialisedTiles
from engine.moe.expert_products import run_experts, run_experts_reference

_logger = logging.getLogger(__name__)
_MAX_ERROR = 0.06  # of FP8 rows and sums, relative to float32 with the same weights


def can_specialise(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """dtype is that of the tokens. Takes seconds for the first layer of a process."""
    device = weights.down.device
    is_whole = all(size % FP8_GROUP == 0 for size in weights.down.shape[1:])
    return weights.is_fp8 and dtype == torch.bfloat16 and is_whole and _is_hopper(device) and _works(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _works(device: torch.device) -> bool:
    try:
        error = _trial_error(device)
    except Exception as failure:  # noqa: BLE001 - whatever Triton says, other tiles are there
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
    else:
        if error <= _MAX_ERROR:
            return True
        reason = f"an error of {error:.3g}"
    _logger.warning("experts of many tokens fall back to slower kernels: %s", reason)
    return False


def _trial_error(device: torch.device) -> float:
    """Relative. Of tiles that are full, half full and nearly empty, in an odd number of blocks of columns."""
    spec = GateSpec(
        num_experts=2,
        num_shared=1,
        top_k=1,
        is_sigmoid=False,
        num_groups=1,
        topk_groups=1,
        is_group_of_two=False,
        norm_weights=False,
        scaling_factor=1.0,
    )
    num_tokens, num_first = 200, 130
    hidden, size = 3 * FP8_GROUP, 2 * FP8_GROUP
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    up_gate, up_gate_scale = _quantised(random(3, 2 * size, hidden) * hidden**-0.5)
    down, down_scale = _quantised(random(3, hidden, size) * size**-0.5)
    weights = ExpertWeights(up_gate, down, up_gate_scale, down_scale)
    ids = torch.tensor([[int(t >= num_first), 2] for t in range(num_tokens)], dtype=torch.int32)
    counts = torch.bincount(ids.flatten(), minlength=3).int()[None]
    choice = Choice(random(num_tokens, 2), ids.to(device), counts.to(device), num_tokens)
    x = random(num_tokens, hidden).bfloat16()
    found = run_experts(x, choice, spec, weights, SpecialisedTiles()).float()
    expected = run_experts_reference(x, choice, spec, weights)
    return float((found - expected).norm() / expected.norm())


def _quantised(weight_ENK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = zip(*(fp8.quantise(w, (FP8_GROUP, FP8_GROUP)) for w in weight_ENK), strict=True)
    return torch.stack(values), torch.stack(scales)
