# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Launches that overlap with the kernel before them on the stream (programmatic dependent launch, from
compute capability 9.0): a kernel may start when every program of the one before has called signal() or ended.

The rule for a kernel that is launched with launch_options():
1. It calls wait() before it writes anything, and before it reads anything that a kernel writes. Weights and
   other constants may be read before.
2. Some program of every launch calls wait(). Then the end of a kernel means the end of all kernels before it,
   so what follows a wait is ordered as if launches did not overlap: also writing where a kernel two launches
   ago read.
3. signal() promises nothing about memory and comes first, so that the successor's programs can be there
   early.
A kernel launched in the ordinary way, as torch's are, starts when all before it have ended, and its end is
its signal.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 32  # of a step whose launches overlap: those of many rows are long enough to do without


def launch_options(num_rows: int) -> dict[str, Any]:
    """Keyword arguments of a launch; the kernel has a constexpr DEPENDENT for wait() and signal()."""
    is_dependent = num_rows <= MAX_ROWS and _is_supported()
    return {"DEPENDENT": is_dependent, "launch_pdl": is_dependent}


@cache
def _is_supported() -> bool:
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Until all kernels before this one have ended and their writes are here."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def signal(DEPENDENT: tl.constexpr):
    """The next kernel may start once every program got here."""
    if DEPENDENT:
        gdc_launch_dependents()
