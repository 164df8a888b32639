"""How well a median is known from a few values, whatever their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """A median of exactly `value` is below it: a limit is met by what reaches it."""
        return self.high <= value or self.low > value


def median_interval(values: Sequence[float], confidence: float = 0.99) -> Interval | None:
    """The narrowest interval between two of the ordered values, equally far from both ends, that holds the
    median of what they were drawn from with this probability. None: too few values.

    The number of values below the median is binomial with 1/2 (the sign test's interval).
    """
    ordered, count = sorted(values), len(values)
    outside = 0.0  # the probability that the median is beyond the value at `rank`, at one end
    found = None
    for rank in range((count + 1) // 2):
        outside += math.comb(count, rank) / 2**count
        if 2 * outside > 1 - confidence:
            break
        found = Interval(ordered[rank], ordered[count - 1 - rank])
    return found
