from baton.up.restart_policy import RestartPolicy


def test_a_crash_after_serving_is_followed_by_a_quick_restart():
    assert RestartPolicy().delay_after_exit(100.0, -9, was_ready=True) == 0.5


def test_delays_double_while_crashes_follow_each_other():
    policy = RestartPolicy()
    delays = [policy.delay_after_exit(100.0 + i, 1, was_ready=True) for i in range(4)]
    assert delays == [0.5, 1.0, 2.0, 4.0]


def test_the_fifth_crash_in_two_minutes_is_the_last():
    policy = RestartPolicy()
    delays = [policy.delay_after_exit(100.0 + i, 1, was_ready=True) for i in range(5)]
    assert delays[-1] is None


def test_rare_crashes_never_add_up():
    policy = RestartPolicy()
    assert {policy.delay_after_exit(1000.0 * i, 1, was_ready=True) for i in range(20)} == {0.5}


def test_three_starts_in_a_row_that_never_served_are_enough():
    policy = RestartPolicy()
    delays = [policy.delay_after_exit(1000.0 * i, 1, was_ready=False) for i in range(3)]
    assert delays == [0.5, 0.5, None]


def test_a_mistake_in_the_settings_is_not_tried_again():
    assert RestartPolicy().delay_after_exit(0.0, 2, was_ready=False) is None
