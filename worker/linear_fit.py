"""What a duration is made of, learnt while it is measured.

Least squares over decaying observations of y = c . x with c >= 0, each observation weighted by 1 / y^2 so
that a long one counts as much as a short one. A slight ridge, relative to the data, shares a duration out
evenly between terms that always come together. The few terms make it cheap to try every set of non-zero
ones, which is exact (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_RIDGE = 1e-3
_SHORTEST_S = 1e-6


class LinearFit:
    def __init__(self, num_terms: int, *, decay: float) -> None:
        """`decay`: of older observations with each new one, in (0, 1)."""
        self._decay = decay
        self._xx = [[0.0] * num_terms for _ in range(num_terms)]
        self._xy = [0.0] * num_terms

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """`terms` are 0 or more. Runs in every step: arrays of so few numbers would cost more."""
        decay, weight = self._decay, 1.0 / max(seconds, _SHORTEST_S)
        x = [term * weight for term in terms]
        self._xx = [
            [old * decay + a * b for old, b in zip(row, x, strict=True)]
            for row, a in zip(self._xx, x, strict=True)
        ]
        self._xy = [old * decay + a for old, a in zip(self._xy, x, strict=True)]

    def solve(self) -> list[float | None]:
        """Seconds for one of each term, 0 or more. None: the term was 0 whenever something was observed."""
        all_xx, all_xy = np.array(self._xx), np.array(self._xy)
        scale = np.sqrt(np.diag(all_xx))
        seen = [index for index in range(len(scale)) if scale[index] > 0]
        found: list[float | None] = [None] * len(scale)
        if not seen:
            return found
        units = scale[seen]
        xx = all_xx[np.ix_(seen, seen)] / np.outer(units, units) + _RIDGE * np.eye(len(seen))
        for index, coefficient in zip(seen, _solve_positive(xx, all_xy[seen] / units) / units, strict=True):
            found[index] = float(coefficient)
        return found


def _solve_positive(xx: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The c >= 0 with the least c.xx.c - 2 c.xy; `xx` is positive definite."""
    num_terms = len(xy)
    best, best_loss = np.zeros(num_terms), 0.0
    for size in range(1, num_terms + 1):
        for chosen in map(list, combinations(range(num_terms), size)):
            part = np.linalg.solve(xx[np.ix_(chosen, chosen)], xy[chosen])
            loss = -float(part @ xy[chosen])
            if (part >= 0).all() and loss < best_loss:
                best, best_loss = np.zeros(num_terms), loss
                best[chosen] = part
    return best
