from __future__ import annotations

from kvstore.leases import Leased, LeaseView
from servicekit.clock import FakeClock


def test_a_listed_holder_stays_while_it_renews() -> None:
    clock = FakeClock()
    view = LeaseView[str](clock.monotonic)
    view.update([Leased("a", "old load", 3.0)])
    clock.advance(2.0)
    view.update([Leased("a", "new load", 3.0)])
    clock.advance(2.0)
    view.update([Leased("a", "new load", 1.0)])
    assert view.values() == {"a": "new load"}


def test_a_missing_holder_stays_until_its_lease_has_run_out() -> None:
    clock = FakeClock()
    view = LeaseView[str](clock.monotonic)
    view.update([Leased("a", "x", 3.0)])
    clock.advance(2.9)
    view.update([])
    assert view.values() == {"a": "x"}
    clock.advance(0.1)
    view.update([])
    assert view.values() == {}


def test_nobody_is_dropped_while_the_store_is_lost_and_each_gets_a_whole_lease_afterwards() -> None:
    clock = FakeClock()
    view = LeaseView[str](clock.monotonic)
    view.update([Leased("a", "x", 3.0)])
    clock.advance(1.0)
    view.update([Leased("a", "x", 2.0)])
    view.store_lost()
    clock.advance(1000.0)
    view.update([])
    clock.advance(2.9)
    view.update([])
    assert view.values() == {"a": "x"}
    clock.advance(0.1)
    view.update([])
    assert view.values() == {}


def test_withdrawal_drops_at_once() -> None:
    view = LeaseView[str](FakeClock().monotonic)
    view.update([Leased("a", "x", 3.0), Leased("b", "y", 3.0)])
    view.withdraw("a")
    view.withdraw("never there")
    assert view.values() == {"b": "y"}


def test_next_end_is_that_of_the_first_lease_to_run_out() -> None:
    clock = FakeClock()
    view = LeaseView[str](clock.monotonic)
    assert view.next_end_s() is None
    view.update([Leased("a", "x", 3.0), Leased("b", "y", 5.0)])
    clock.advance(1.0)
    assert view.next_end_s() == 2.0
