"""Percentiles of the last seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise

from router.activity import Activity, Leg
from servicekit.metrics import TokenHistogram

_WINDOW = 10  # looks, one a second: what is shown stands for so long

Percentiles = tuple[float, float]  # p50 and p99, seconds


class LatencyWindow:
    """Fed by one look at a time; every look covers what came since the one before."""

    def __init__(self, activity: Activity, itl: TokenHistogram) -> None:
        self._activity = activity
        self._itl = itl
        self._ttft_s: deque[list[float]] = deque(maxlen=_WINDOW)
        self._tpot_s: deque[list[float]] = deque(maxlen=_WINDOW)
        self._legs: deque[dict[tuple[str, str], Leg]] = deque(maxlen=_WINDOW)
        self._itl_counts: deque[list[int]] = deque([list(itl.counts)], maxlen=_WINDOW + 1)

    def look(self) -> dict[tuple[str, str], Leg]:
        """The ways that first tokens took since the last look."""
        ttft_s, tpot_s, legs = self._activity.take()
        self._ttft_s.append(ttft_s)
        self._tpot_s.append(tpot_s)
        self._legs.append(legs)
        self._itl_counts.append(list(self._itl.counts))
        return legs

    def percentiles(self) -> dict[str, Percentiles | None]:
        """None: nothing came."""
        counts = [new - old for old, new in zip(self._itl_counts[0], self._itl_counts[-1], strict=True)]
        return {
            "ttft": percentiles([value for values in self._ttft_s for value in values]),
            "tpot": percentiles([value for values in self._tpot_s for value in values]),
            "itl": histogram_percentiles(self._itl.bounds, counts),
        }

    def rates(self) -> dict[str, float]:
        """Sequences and tokens a second, and the share of prompt tokens that a cache held."""
        seconds = max(1, len(self._itl_counts) - 1)
        num_first = sum(map(len, self._ttft_s))
        num_later = sum(self._itl_counts[-1]) - sum(self._itl_counts[0])
        legs = [leg for period in self._legs for leg in period.values()]
        num_prompt = sum(leg.num_prompt_tokens for leg in legs)
        return {
            "sequences_per_s": num_first / seconds,
            "tokens_per_s": (num_first + num_later) / seconds,
            "hit_ratio": sum(leg.num_hit_tokens for leg in legs) / num_prompt if num_prompt else 0.0,
        }


def percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.5 * last)], ordered[round(0.99 * last)]


def histogram_percentiles(bounds: Sequence[float], counts: Sequence[int]) -> Percentiles | None:
    """Straight between the bounds of the bucket that holds the percentile; at most the highest bound."""
    total = sum(counts)
    if not total:
        return None
    edges = list(pairwise([0.0, *bounds, bounds[-1]]))
    reached = list(accumulate(counts))

    def value(share: float) -> float:
        wanted = share * total
        index = next(i for i, num in enumerate(reached) if num >= wanted and counts[i])
        low, high = edges[index]
        return low + (high - low) * (wanted - (reached[index] - counts[index])) / counts[index]

    return value(0.5), value(0.99)
