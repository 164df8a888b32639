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
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_what_exists_is_never_visited_again_and_new_garbage_still_is_found() -> None:
    old = _Ring()
    exempt_from_garbage_search()
    assert all(each is not old for each in gc.get_objects())
    assert gc.isenabled()
    _Ring()
    assert gc.collect() >= 1
