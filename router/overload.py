"""Refuses what would wait too long, at once and before any worker works for it.

The wait of a sequence is predicted from what its workers have before it and how fast they get through that:
- prompt tokens queued where its prompt is computed / the measured tokens per second there;
- sequences beyond the batch of its decode worker x mean time in the batch / places in the batch. By Little's
  law a full batch of B that each stay R seconds frees B / R places a second.
The larger one counts: while a sequence waits for a place its prompt waits too. What is not measured yet
counts as no wait, so nothing is refused on a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.api_keys import Priority
from router.link import Link
from router.route_planner import Route
from router.service_times import ServiceTimes
from servicekit.errors import Overloaded

# How much of max_queue_wait_s a request may wait: when it gets tight, the least important are refused first.
_PATIENCE: dict[Priority, float] = {"low": 0.5, "normal": 1.0, "high": 1.5}

Replan = Callable[[set[Link]], Route | None]  # a route without these workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What one request can bear."""

    time_left_s: float | None  # until its deadline; None: none
    max_tokens: int  # of its answer
    priority: Priority = "normal"


class OverloadGuard:
    def __init__(self, max_queue_wait_s: float) -> None:
        """`max_queue_wait_s`: 0 for no limit but the deadline."""
        self.times = ServiceTimes()
        self._max_queue_wait_s = max_queue_wait_s

    def admitted(self, route: Route, patience: Patience, replan: Replan) -> Route:
        """`route`, or one over other workers that wait less. Raises Overloaded when all are too busy."""
        tried: set[Link] = set()
        least_excess_s = float("inf")
        candidate: Route | None = route
        while candidate is not None:
            excess_s = self._excess_s(candidate, patience)
            if excess_s <= 0:
                return candidate
            least_excess_s = min(least_excess_s, excess_s)
            tried.add(candidate.link)
            candidate = replan(tried)
        raise Overloaded(
            "every worker is busy for longer than this request may wait", retry_after_s=least_excess_s
        )

    def predicted_wait_s(self, route: Route) -> float:
        prefill_s = (
            route.num_tokens_ahead / route.prefill_tokens_per_s if route.prefill_tokens_per_s > 0 else 0.0
        )
        places = route.decode.max_running
        if not places:
            return prefill_s
        num_departures = max(0, route.num_requests_ahead + 1 - places)
        return max(prefill_s, num_departures * self.times.residence_s / places)

    def _excess_s(self, route: Route, patience: Patience) -> float:
        """Seconds that the wait is too long."""
        wait_s = self.predicted_wait_s(route)
        excess_s = -1.0
        if self._max_queue_wait_s:
            excess_s = wait_s - self._max_queue_wait_s * _PATIENCE[patience.priority]
        if patience.time_left_s is not None:
            excess_s = max(excess_s, wait_s + self._service_s(route, patience) - patience.time_left_s)
        return excess_s

    def _service_s(self, route: Route, patience: Patience) -> float:
        """From the end of the wait to the last token, as far as is known."""
        rate = route.prefill_tokens_per_s
        prefill_s = route.decision.num_computed_tokens / rate if rate > 0 else 0.0
        return prefill_s + self.times.tpot_s * min(patience.max_tokens, self.times.num_tokens)
