import random

import pytest

from benchmarks.median_interval import Interval, median_interval


def test_seven_values_are_too_few_and_eight_are_all_it_takes():
    assert median_interval([1.0] * 7) is None
    assert median_interval([3.0, 1.0, 2.0, 8.0, 4.0, 5.0, 7.0, 6.0]) == Interval(1.0, 8.0)


def test_ranks_are_those_of_the_tables_of_the_sign_test():
    # 20 values: the 4th and the 17th hold the median with 99.74 %, the 5th and the 16th with 98.8 % only.
    assert median_interval(list(range(1, 21))) == Interval(4, 17)
    assert median_interval(list(range(1, 21)), confidence=0.95) == Interval(6, 15)


def test_the_median_is_inside_as_often_as_promised():
    draw = random.Random(4)
    num_inside = 0
    for _ in range(2000):
        interval = median_interval([draw.lognormvariate(0.0, 1.0) for _ in range(15)], confidence=0.9)
        num_inside += interval.low <= 1.0 <= interval.high
    assert 0.9 <= num_inside / 2000 <= 0.98  # ranks are whole, so a little more than promised


@pytest.mark.parametrize(
    ("interval", "is_excluded"),
    [
        ((0.9, 1.0), True),
        ((0.9, 1.05), True),
        ((0.9, 1.06), False),
        ((1.05, 1.2), False),
        ((1.06, 1.2), True),
    ],
)
def test_a_limit_is_met_by_what_reaches_it(interval, is_excluded):
    assert Interval(*interval).excludes(1.05) == is_excluded
