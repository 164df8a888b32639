import argparse

import pytest

from baton.bench import command
from baton.bench.dataset import arrivals, build_sessions, dataset_name
from baton.bench.measurement import RequestMeasurement, summarize
from baton.bench.report import render_rows
from baton.bench.trace import TraceShape, make_trace, write_trace


def options(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def first_prompts(sessions):
    return [session.turns[0].new_ids for session in sessions]


def test_by_default_prompts_are_random_and_share_nothing():
    sessions, arrivals_s = build_sessions(options("--num-requests", 5, "--prompt-len", 30), seed=0)
    assert arrivals_s is None
    assert len({prompt[:3] for prompt in first_prompts(sessions)}) == 5


def test_shared_prefix_means_four_fifths_of_the_prompt_in_eight_groups():
    args = options("--dataset", "shared-prefix", "--num-requests", 200, "--prompt-len", 50)
    prompts = first_prompts(build_sessions(args, seed=0)[0])
    assert len({prompt[:40] for prompt in prompts}) == 8
    assert len({prompt[:41] for prompt in prompts}) > 100


def test_multi_turn_gives_about_the_asked_number_of_requests():
    args = options("--dataset", "multi-turn", "--num-requests", 10, "--num-turns", 3)
    sessions, _ = build_sessions(args, seed=0)
    assert [session.num_requests for session in sessions] == [3, 3, 3, 3]


def test_a_trace_brings_its_own_arrivals(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = make_trace(TraceShape(num_requests=9, requests_per_s=1.0))
    write_trace(path, requests)
    args = options("--trace", path, "--num-requests", 6, "--trace-time-scale", 0.5)
    sessions, arrivals_s = build_sessions(args, seed=0)
    assert arrivals_s == [r.timestamp_ms / 2000 for r in requests[:6]]
    assert len(sessions) == 6


def test_classes_are_sent_as_asked():
    args = options("--class", "chat=75:20:2", "--class", "long=25:60:3", "--num-requests", 40)
    sessions, _ = build_sessions(args, seed=0)
    assert {session.class_name for session in sessions} == {"chat", "long"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dataset", "trace"),
        ("--dataset", "random", "--trace", "x"),
        ("--dataset", "multi-turn", "--class", "a=1:1:1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments):
    with pytest.raises(ValueError, match="--"):
        dataset_name(options(*arguments))


def test_sessions_begin_so_that_their_turns_make_the_rate():
    args = options("--dataset", "multi-turn", "--num-requests", 4000, "--num-turns", 4, "--prompt-len", 1)
    sessions, _ = build_sessions(args, seed=0)
    times = arrivals(sessions, 20.0, seed=3)
    assert len(times) == 1000
    assert times[-1] == pytest.approx(4000 / 20.0, rel=0.1)


def test_rates_of_a_sweep_send_different_prompts():
    args = options("--rate", 1, 2, "--num-requests", 3)
    plans = [command._plan(args, rate, args.seed + i * 7) for i, rate in enumerate(args.rate)]
    assert set(first_prompts(plans[0].sessions)).isdisjoint(first_prompts(plans[1].sessions))
    assert plans[0].arrivals_s[-1] != plans[1].arrivals_s[-1]


def test_a_table_has_one_line_for_each_rate():
    good = RequestMeasurement(0.0, [0.1, 0.3], num_prompt_tokens=10, num_output_tokens=2, num_hit_tokens=5)
    bad = RequestMeasurement(0.0, error="full")
    rows = {"1": summarize([good], 200, 300), "2": summarize([good, bad], 50, 300)}
    lines = render_rows("rate", rows).splitlines()
    assert lines[1].split() == ["1", "1/1", "100/100", "200/200", "6.7", "50.0%", "3.33", "3.33"]
    assert lines[2].split() == ["2", "1/2", "100/100", "200/200", "6.7", "50.0%", "3.33", "0.00"]
