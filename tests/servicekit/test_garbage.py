from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from servicekit.garbage import exempt_from_garbage_search


class _Ring:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds, callbacks = gc.get_threshold(), list(gc.callbacks)
    yield
    gc.callbacks[:] = callbacks
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_what_exists_is_never_visited_again_and_new_garbage_still_is_found() -> None:
    old = _Ring()
    exempt_from_garbage_search()
    assert all(each is not old for each in gc.get_objects())
    assert gc.isenabled()
    _Ring()
    assert gc.collect() >= 1


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_a_long_search_is_in_the_log_at_debug(
    level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(level)
    monkeypatch.setattr("servicekit.garbage._LOGGED_S", 0.0)
    exempt_from_garbage_search()
    gc.collect()
    found = [record for record in caplog.records if record.message == "garbage_search"]
    assert bool(found) is (level == "DEBUG")
    assert all(record.fields["generation"] == 2 for record in found)  # type: ignore[attr-defined]
