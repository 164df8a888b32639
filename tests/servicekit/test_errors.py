from __future__ import annotations

import pytest

from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("too long", param="messages", code="context_length_exceeded"),
        Overloaded("no room", retry_after_s=2.5),
        WorkerLost("gone"),
        HandoffFailed("checksum", state="TRANSFERRING"),
    ],
)
def test_each_failure_is_a_serving_error_that_shows_its_message(error: ServingError) -> None:
    assert isinstance(error, ServingError)
    assert str(error) in {"too long", "no room", "gone", "checksum"}


def test_failures_carry_what_their_handlers_need() -> None:
    assert InvalidRequest("x", param="n", code="c").param == "n"
    assert InvalidRequest("x", param="n", code="c").code == "c"
    assert Overloaded("x", retry_after_s=2.5).retry_after_s == 2.5
    assert HandoffFailed("x", state="RESERVED").state == "RESERVED"
