"""What benchmarks.gpu_decode_step compares in one run. Goes when the comparison is made: winners stay as the
only path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepSwitches:
    dependent_rows: int = 32  # launches of at most so many rows overlap with their predecessor; 0: none
    joins_gate: bool = True  # sum, norm and gate in one kernel
    joins_combine: bool = True  # weighted sum of experts, residual sum and norm in one kernel
    joins_attention: bool = True  # rows and absorbed query; merged shares and value expansion
    prefetches_down: bool = True  # the experts' second weights while the first are multiplied
    fetched_shared: int = 6  # Mi elements of the shared experts' first weights, while the gate decides
    gate_experts: int = 2  # of a program of the joined gate
    gate_warps: int = 4  # twice as many beyond two rows
    few_rows: int = 4  # up to so many by few_rows
    tile_rows: int = 8  # beyond, up to so many by linear tiles, else by cuBLAS


SWITCHES = StepSwitches()
