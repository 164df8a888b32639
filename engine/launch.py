"""A step that was started, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.grammar.step_masks import GrammarTimes
from engine.speculation.verification import NewTokens

LOAD_STEPS = 256  # off the CPU the load of the experts is read in one step of so many


@dataclass(slots=True)
class StepResult:
    new: list[NewTokens] = field(default_factory=list)
    expert_load: tuple[tuple[int, ...], ...] = ()
    grammar: GrammarTimes = field(default_factory=GrammarTimes)


class Launch(Protocol):
    @property
    def is_open(self) -> bool:
        """Another step may be launched before collect(): every token it needs is on the device."""
        ...

    @property
    def is_done(self) -> bool:
        """collect() would not wait."""
        ...

    @property
    def device_s(self) -> float | None:
        """What it took the device, after collect(); None: it was computed while it was launched."""
        ...

    def collect(self) -> StepResult:
        """Waits for the step. Once."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedLaunch:
    """A step that was computed while it was launched."""

    result: StepResult
    is_open: bool = False
    is_done: bool = True
    device_s: float | None = None

    def collect(self) -> StepResult:
        return self.result
