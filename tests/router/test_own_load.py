from __future__ import annotations

from router.own_load import OwnLoad


def test_what_was_just_sent_counts_though_the_worker_has_not_told_of_it() -> None:
    own = OwnLoad()
    own.told()
    own.begin()
    own.num_tokens += 100
    assert own.requests(0) == 1
    assert own.tokens(0, 0) == 100


def test_what_the_worker_has_told_of_does_not_count_twice() -> None:
    own = OwnLoad()
    own.begin()
    own.num_tokens += 100
    own.told()
    assert own.requests(1) == 1
    assert own.tokens(100, 1) == 100


def test_what_has_ended_does_not_count_though_the_worker_still_tells_of_it() -> None:
    own = OwnLoad()
    own.begin()
    own.num_tokens += 100
    own.told()
    own.end()
    own.num_tokens -= 100
    assert own.requests(1) == 0
    assert own.tokens(100, 1) == 0
    for _ in range(2):  # perhaps made before the end
        own.told()
        assert own.requests(1) == 0
    own.told()
    assert own.requests(1) == 1  # of somebody else


def test_requests_of_others_come_on_top() -> None:
    own = OwnLoad()
    own.begin()
    own.num_tokens += 100
    own.told()
    own.begin()
    own.num_tokens += 100
    assert own.requests(4) == 5
    assert own.tokens(1000, 4) == 200 + 750


def test_of_others_those_that_wait_are_taken_to_wait_for_their_prompts() -> None:
    own = OwnLoad()
    own.begin()
    own.num_handing_off += 1
    own.told()
    assert own.handing_off(1, 1) == 1
    assert own.handing_off(5, 3) == 1 + 2


def test_everything_told_by_a_worker_without_own_requests_is_of_others() -> None:
    own = OwnLoad()
    own.told()
    assert own.tokens(5000, 0) == 5000
