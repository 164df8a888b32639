"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Without a GPU kernels run under Triton's interpreter, which is chosen before any kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test is timed: a machine may be busy with something else.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
