"""What a reader of leases may still believe, also while Redis is away or has come back empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Leased(Generic[T]):
    key: str
    value: T
    remaining_s: float


class LeaseView(Generic[T]):
    """The holders as one reader knows them.

    1. A listing that shows a holder brings its value and the end of its lease up to date.
    2. A holder missing from a listing stays until its lease, as last seen, has run out: a Redis that came
       back empty must not look like the death of every worker.
    3. No listing, no change: while Redis is away nobody is dropped. The first listing afterwards gives the
       missing a whole lease to come back: the longest that was seen of theirs.
    4. withdraw() drops at once.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._values: dict[str, T] = {}
        self._longest_s: dict[str, float] = {}
        self._ends_at: dict[str, float] = {}
        self._is_store_lost = False

    def store_lost(self) -> None:
        self._is_store_lost = True

    def update(self, listing: Iterable[Leased[T]]) -> None:
        now = self._monotonic()
        if self._is_store_lost:
            self._is_store_lost = False
            self._ends_at = {key: now + longest_s for key, longest_s in self._longest_s.items()}
        listed = set()
        for leased in listing:
            listed.add(leased.key)
            self._values[leased.key] = leased.value
            self._ends_at[leased.key] = now + leased.remaining_s
            self._longest_s[leased.key] = max(leased.remaining_s, self._longest_s.get(leased.key, 0.0))
        for key in [key for key, end in self._ends_at.items() if key not in listed and end <= now]:
            self.withdraw(key)

    def withdraw(self, key: str) -> None:
        for table in (self._values, self._ends_at, self._longest_s):
            table.pop(key, None)

    def values(self) -> dict[str, T]:
        return dict(self._values)

    def next_end_s(self) -> float | None:
        """Seconds until the first lease runs out if nobody renews it; None when there is none."""
        if not self._ends_at:
            return None
        return max(0.0, min(self._ends_at.values()) - self._monotonic())
