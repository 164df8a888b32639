from __future__ import annotations

import random

import pytest

from engine.step_clock import StepClock

DECODES = (100, 0)


class Device:
    """Steps one after another, each planned when the clock says; the host wakes up to `late_s` late."""

    def __init__(self, plan_s: float, late_s: float = 0.0) -> None:
        self.now = 1000.0
        self.idle_s = 0.0
        self.heard_s = 0.0
        self.clock = StepClock(lambda: self.now)
        self.plan_s = plan_s
        self.late_s = late_s
        self._rng = random.Random(1)

    def step(self, work: tuple[int, int], seconds: float) -> None:
        began, end = self.now, self.now + seconds
        plan_at = max(began, self.clock.plan_at(work, began))
        has_waited = plan_at > began
        self.heard_s += plan_at - began
        self.now = plan_at + has_waited * self._rng.random() * self.late_s + self.plan_s
        self.clock.planned(plan_at, was_late=has_waited and self.now > end)
        self.idle_s += max(0.0, self.now - end)
        self.now = max(self.now, end)
        self.clock.ended(work, seconds)

    def steps(self, num: int, seconds: float) -> None:
        for _ in range(num):
            self.step(DECODES, seconds)

    @property
    def wait_s(self) -> float:
        return self.clock.plan_at(DECODES, self.now) - self.now


def test_a_step_of_unknown_length_is_not_waited_for() -> None:
    device = Device(plan_s=0.001)
    assert device.wait_s == 0.0
    device.step(DECODES, 0.010)
    assert device.clock.plan_at((5, 0), device.now) == device.now


def test_the_next_step_is_planned_when_this_one_is_about_to_end() -> None:
    device = Device(plan_s=0.001)
    device.steps(1, 0.010)
    assert device.wait_s == pytest.approx(0.010 - 1.25 * 0.001 - 0.0003)


def test_a_step_with_more_prompt_tokens_takes_at_least_as_long() -> None:
    device = Device(plan_s=0.001)
    device.step(DECODES, 0.010)
    device.step((100, 512), 0.020)
    plan_at = {work: device.clock.plan_at(work, device.now) for work in ((100, 256), (100, 2000), DECODES)}
    assert plan_at[100, 256] == plan_at[DECODES] < plan_at[100, 2000]


def test_what_is_short_anyway_is_not_slept_through() -> None:
    device = Device(plan_s=0.001)
    device.steps(5, 0.002)
    assert device.wait_s == 0.0


def test_after_a_late_plan_the_next_ones_are_earlier_for_a_while() -> None:
    device = Device(plan_s=0.001)
    device.steps(40, 0.010)
    usual_s = device.wait_s
    device.plan_s = 0.004
    device.steps(1, 0.010)
    assert device.idle_s > 0.0
    assert device.wait_s == pytest.approx(usual_s - 0.5 * (0.010 - usual_s))
    device.plan_s = 0.001
    device.steps(60, 0.010)
    assert device.wait_s == pytest.approx(usual_s)


def test_one_long_plan_among_short_ones_that_kept_nobody_waiting_changes_nothing() -> None:
    """Beside a busy thread plans are long; that must not make them be made there for ever."""
    device = Device(plan_s=0.006)
    device.steps(20, 0.010)
    device.plan_s = 0.001
    device.steps(200, 0.010)
    assert device.wait_s == pytest.approx(0.010 - 1.25 * 0.001 - 0.0003)


def test_steps_that_became_shorter_are_known_by_what_they_took_the_device() -> None:
    device = Device(plan_s=0.001)
    device.steps(20, 0.020)
    device.steps(2, 0.010)
    late_s = device.idle_s
    device.steps(5, 0.010)
    assert device.idle_s == late_s


@pytest.mark.parametrize("seed", range(5))
def test_a_device_is_kept_busy_and_mostly_listened_beside(seed: int) -> None:
    """Decodes that come and go, prompts beside some steps, a host that is late by up to a millisecond."""
    rng = random.Random(seed)
    device = Device(plan_s=0.0015, late_s=0.001)
    num_decodes, began = 32.0, device.now
    for _ in range(3000):
        num_decodes = min(256.0, max(1.0, num_decodes + rng.choice([-3, -2, -1, 0, 0, 1, 2, 3])))
        prompt = rng.choice([0] * 6 + [128, 512, 1024])
        seconds = 0.008 + 2e-5 * num_decodes + 6e-6 * prompt
        device.step((int(num_decodes), prompt), seconds * rng.uniform(0.98, 1.02))
    elapsed_s = device.now - began
    assert device.idle_s < 0.003 * elapsed_s
    assert device.heard_s > 0.6 * elapsed_s
