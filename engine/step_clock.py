"""When to plan the step behind the one that a device computes.

As late as keeps the device busy: who joins before that is in the next step, who comes later waits for the
one behind it, and hears nothing for two steps. How long a step takes is known from the steps before it. Only
a lower bound counts, because a device that waits for the host is worse than a sequence that joins late.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from math import log2
from statistics import median

_NUM_RECENT = 8  # steps of a kind; the shortest of them counts
_NUM_RECENT_PLANS = 32
_LEAST_SLACK = 1.25  # of the median time from the wish to plan until the launch
_LEAST_SLACK_S = 0.0003
_SLACK_AFTER_LATE = 1.5  # times what it was
_SLACK_AFTER_EARLY = 0.99
_MOST_SLACK_S = 0.1
_LEAST_WAIT_S = 0.0005  # less is not worth a sleep
_KINDS_PER_DOUBLING = 4  # of prompt tokens

Work = tuple[int, int]  # of a step: decodes, prompt tokens


class StepClock:
    """Of one engine. Its times are those of `clock`, in seconds.

    The slack between planning and the end of the step under way grows when the device had to wait, and
    shrinks slowly while it did not: about one step in forty is late, by little. What plans take is no guide
    alone: one that is made while other threads are busy takes longer than one that is made later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: dict[Work, deque[float]] = {}  # seconds, by kind of step
        self._prompt_kinds: dict[int, list[int]] = {}  # by kind of decodes, ascending
        self._plans: deque[float] = deque(maxlen=_NUM_RECENT_PLANS)
        self.slack_s = _LEAST_SLACK_S

    def plan_at(self, work: Work, began: float) -> float:
        """When to plan the step behind one that began then on the device; perhaps long ago."""
        plan_at = began + self._least_s(work) - self.slack_s
        return plan_at if plan_at - self._clock() > _LEAST_WAIT_S else began

    def planned(self, plan_at: float, *, was_late: bool) -> None:
        """What was to be planned then is launched now. was_late: the device had nothing to do any more,
        though it had been waited for."""
        self._plans.append(max(0.0, self._clock() - plan_at))
        least_s = _LEAST_SLACK * median(self._plans) + _LEAST_SLACK_S
        slack_s = self.slack_s * (_SLACK_AFTER_LATE if was_late else _SLACK_AFTER_EARLY)
        self.slack_s = min(max(slack_s, least_s), _MOST_SLACK_S)

    def ended(self, work: Work, device_s: float) -> None:
        """device_s: what the step took the device."""
        decodes, prompt = kind = _kind(work)
        if kind not in self._recent:
            self._recent[kind] = deque(maxlen=_NUM_RECENT)
            insort(self._prompt_kinds.setdefault(decodes, []), prompt)
        self._recent[kind].append(device_s)

    def _least_s(self, work: Work) -> float:
        """Of the recent steps with about as many decodes and about as many prompt tokens, or, where there was
        none, with the next fewer ones."""
        decodes, prompt = _kind(work)
        prompts = self._prompt_kinds.get(decodes, ())
        place = bisect_right(prompts, prompt)
        return min(self._recent[decodes, prompts[place - 1]]) if place else 0.0


def _kind(work: Work) -> Work:
    num_decodes, num_prompt_tokens = work
    prompt = int(1 + _KINDS_PER_DOUBLING * log2(num_prompt_tokens)) if num_prompt_tokens else 0
    return num_decodes.bit_length(), prompt
