"""Drawing the tokens of a step on the device, behind its logits: nothing of it waits for the host.

N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.sampler import GREEDY_BELOW, is_truncated
from engine.sequence import Sequence
from engine.uploads import upload

_MAX_INT32 = 2**31 - 1


class DeviceDraws:
    """What the rows of a buffer ask for; it is uploaded when other sequences have the rows."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        from engine.kernels.sampling import RowSampling, draw_tokens  # Triton is not everywhere

        self._draw = draw_tokens
        self._device = device
        self._seqs: list[Sequence] = []
        self._has_truncated = False
        self._sampling = RowSampling(
            temperature_N=torch.zeros(num_rows, dtype=torch.float32, device=device),
            top_k_N=torch.zeros(num_rows, dtype=torch.int32, device=device),
            top_p_N=torch.ones(num_rows, dtype=torch.float32, device=device),
            min_p_N=torch.zeros(num_rows, dtype=torch.float32, device=device),
            seed_N=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def draw(
        self, logits_NV: torch.Tensor, seqs: list[Sequence], positions_N: torch.Tensor, out_N: torch.Tensor
    ) -> None:
        """The next token of seqs[n] to out_N[n], int64; greedy ones too. positions_N: of these tokens."""
        num_rows = len(seqs)
        if seqs != self._seqs:
            self._set(seqs)
        sampling = self._sampling.rows(num_rows)
        self._draw(
            logits_NV[:num_rows],
            sampling,
            positions_N[:num_rows],
            out_N[:num_rows],
            is_truncated=self._has_truncated,
        )

    def _set(self, seqs: list[Sequence]) -> None:
        params = [seq.sampling for seq in seqs]
        self._seqs = list(seqs)
        self._has_truncated = any(map(is_truncated, seqs))
        temperatures = [p.temperature if p.temperature >= GREEDY_BELOW else 0.0 for p in params]
        sampling = self._sampling.rows(len(seqs))
        seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
        for target, values in (
            (sampling.temperature_N, np.array(temperatures, dtype=np.float32)),
            (sampling.top_k_N, np.array([min(p.top_k, _MAX_INT32) for p in params], dtype=np.int32)),
            (sampling.top_p_N, np.array([p.top_p for p in params], dtype=np.float32)),
            (sampling.min_p_N, np.array([p.min_p for p in params], dtype=np.float32)),
            (sampling.seed_N, seeds),
        ):
            target.copy_(upload(values, self._device))
