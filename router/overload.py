"""Refuses what would wait too long, at once and before any worker works for it.

The wait of a sequence is predicted from what its workers have before it and how fast they get through that:
- the wait that its route was chosen with (router/route_cost.py): prompt tokens queued where its prompt is
  computed, and KV room where it is decoded;
- sequences beyond the batch of its decode worker x mean time in the batch / places in the batch. By Little's
  law a full batch of B that each stay R seconds frees B / R places a second.
The larger one counts: while a sequence waits for a place its prompt waits too. What is not measured yet
counts as no wait, so nothing is refused on a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.link import Link
from router.route_planner import Route
from router.service_times import ServiceTimes
from servicekit.errors import Overloaded

# How much of max_queue_wait_s a request may wait: when it gets tight, those behind the ordinary ones are
# refused first. So what may wait cannot fill the queue for what may not.
_PATIENCE_BEHIND, _PATIENCE, _PATIENCE_AHEAD = 0.5, 1.0, 1.5

Replan = Callable[[set[Link]], Route | None]  # a route without these workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What one request can bear."""

    time_left_s: float | None  # until its deadline; None: none
    max_tokens: int  # of its answer
    priority: int = 0

    @property
    def share(self) -> float:
        """Of max_queue_wait_s."""
        if self.priority == 0:
            return _PATIENCE
        return _PATIENCE_BEHIND if self.priority > 0 else _PATIENCE_AHEAD


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
        decision = route.decision
        wait_s = decision.terms.wait_s if decision.is_measured else 0.0
        places = route.decode.max_running
        if not places:
            return wait_s
        num_departures = max(0, route.num_requests_ahead + 1 - places)
        return max(wait_s, num_departures * self.times.residence_s / places)

    def _excess_s(self, route: Route, patience: Patience) -> float:
        """Seconds that the wait is too long."""
        wait_s = self.predicted_wait_s(route)
        excess_s = -1.0
        if self._max_queue_wait_s:
            excess_s = wait_s - self._max_queue_wait_s * patience.share
        if patience.time_left_s is not None:
            excess_s = max(excess_s, wait_s + self._service_s(route, patience) - patience.time_left_s)
        return excess_s

    def _service_s(self, route: Route, patience: Patience) -> float:
        """From the end of the wait to the last token, as far as is known."""
        decision = route.decision
        prompt_s = decision.terms.ttft_s - decision.terms.wait_s if decision.is_measured else 0.0
        return prompt_s + self.times.tpot_s * min(patience.max_tokens, self.times.num_tokens)
