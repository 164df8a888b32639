"""What benchmarks.gpu_decode_step compares in one run. Goes when the comparison is made: winners stay as the
only path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepSwitches:
    dependent_rows: int = 32  # launches of at most so many rows overlap with their predecessor; 0: none
    joins_gate: int = 4  # rows up to which sum, norm and gate are one kernel
    joins_combine: bool = True  # weighted sum of experts, residual sum and norm in one kernel
    joins_attention: int = 4  # rows up to which: rows and absorbed query; merged shares and value expansion
    gate_experts: int = 4  # of a program of the joined gate
    gate_warps: int = 4
    few_rows: int = 4  # up to so many without matrix units
    few_tile: tuple[int, int] = (2, 4)  # outputs and warps of a program
    few_up: tuple[int, int] | None = None  # the same of the experts' first product, if without matrix units
    few_down: tuple[int, int] | None = None
    sums_down: int = 0  # warps of the second product of one token that ends in the sum; 0: apart
    early_shared: bool = True  # without matrix units: shared experts' weights before the choice


SWITCHES = StepSwitches()
