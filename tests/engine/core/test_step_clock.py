from __future__ import annotations

import random

import pytest

from engine.step_clock import StepClock

DECODES = (100, 0)


class Device:
    """Steps one after another, each planned when the clock says; a wake-up is late by up to `late_s`."""

    def __init__(self, plan_s: float, late_s: float = 0.0) -> None:
        self.now = 1000.0
        self.idle_s = 0.0
        self.heard_s = 0.0
        self.num_late = 0
        self.clock = StepClock(lambda: self.now)
        self._plan_s = plan_s
        self._late_s = late_s
        self._rng = random.Random(1)

    def step(self, work: tuple[int, int], seconds: float) -> None:
        began = self.now
        plan_at = max(began, self.clock.plan_at(work, began))
        self.heard_s += plan_at - began
        self.now = plan_at + (plan_at > began) * self._rng.random() * self._late_s + self._plan_s
        self.clock.planned(plan_at)
        was_late = self.now > began + seconds
        self.idle_s += max(0.0, self.now - began - seconds)
        self.num_late += was_late
        self.now = max(self.now, began + seconds)
        self.clock.ended(work, self.now - began, was_late=was_late)


def test_a_step_of_unknown_length_is_not_waited_for() -> None:
    device = Device(plan_s=0.001)
    assert device.clock.plan_at(DECODES, device.now) == device.now
    device.step(DECODES, 0.010)
    assert device.clock.plan_at((5, 0), device.now) == device.now


def test_the_next_step_is_planned_when_this_one_is_about_to_end() -> None:
    device = Device(plan_s=0.001)
    device.step(DECODES, 0.010)
    assert device.clock.plan_at(DECODES, device.now) - device.now == pytest.approx(
        0.010 - 1.25 * 0.001 - 0.0003
    )


def test_a_step_with_more_prompt_tokens_takes_at_least_as_long() -> None:
    device = Device(plan_s=0.001)
    device.step(DECODES, 0.010)
    device.step((100, 512), 0.020)
    plan_at = {work: device.clock.plan_at(work, device.now) for work in ((100, 256), (100, 2000), DECODES)}
    assert plan_at[100, 256] == plan_at[DECODES] < plan_at[100, 2000]


def test_what_is_short_anyway_is_not_slept_through() -> None:
    device = Device(plan_s=0.001)
    device.step(DECODES, 0.002)
    assert device.clock.plan_at(DECODES, device.now) == device.now


def test_a_step_that_was_late_is_followed_by_early_ones_for_a_while() -> None:
    device = Device(plan_s=0.001)
    for _ in range(10):
        device.step(DECODES, 0.020)
    device.step(DECODES, 0.010)
    assert device.num_late == 1
    waits = []
    for _ in range(9):
        waits.append(device.clock.plan_at(DECODES, device.now) - device.now)
        device.step(DECODES, 0.010)
    assert device.num_late == 1
    assert max(waits[:8]) < 0.009
    assert waits[8] == pytest.approx(0.010 - 1.25 * 0.001 - 0.0003)


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
    assert device.idle_s < 0.001 * elapsed_s
    assert device.heard_s > 0.5 * elapsed_s
