import pytest

from baton.bench.measurement import RequestMeasurement
from benchmarks.metrics_page import parse_counters
from benchmarks.prefix_routing import POLICIES, in_turn
from benchmarks.routing_analysis import Run, result_rows, ttft_ms, verdicts
from benchmarks.routing_loads import LOAD_NAMES, Sizes, build_loads


def request(ttft_s, num_hit_tokens=0, error=None):
    return RequestMeasurement(
        sent_at=10.0,
        chunk_times=[10.0 + ttft_s, 10.0 + ttft_s + 0.1],
        num_prompt_tokens=100,
        num_output_tokens=2,
        num_hit_tokens=num_hit_tokens,
        error=error,
    )


def run(load, policy, ttfts_s, repeat=0, num_hit_tokens=0, **counters):
    measurements = [request(ttft_s, num_hit_tokens) for ttft_s in ttfts_s]
    return Run(load=load, policy=policy, repeat=repeat, measurements=measurements, counters=counters)


def test_a_row_pools_the_requests_of_all_repeats():
    runs = [
        run("chat", "prefix", [0.1, 0.2], 0, 50, baton_router_predicted_hit_tokens_total=80.0),
        run(
            "chat",
            "prefix",
            [0.6],
            1,
            50,
            **{"baton_router_predicted_hit_tokens_total": 40.0, "prefilled by decode": 1.0},
        ),
    ]
    [row] = result_rows(runs)
    assert (row["requests"], row["failed"]) == (3, 0)
    assert row["TTFT p50 ms"] == pytest.approx(200)
    assert row["TTFT p50 ms by repeat"] == pytest.approx([150, 600])
    assert row["TTFT ms"] == pytest.approx([100, 200, 600])
    assert row["hit rate"] == pytest.approx(0.5)
    assert row["predicted hit"] == pytest.approx(0.4)
    assert row["prefilled by decode"] == pytest.approx(1 / 3)
    assert row["E2E mean ms"] == pytest.approx(400)
    assert row["all tok/s"] == pytest.approx((204 / 0.3 + 102 / 0.7) / 2)


def test_failed_requests_count_and_have_no_ttft():
    failed = Run(
        load="chat",
        policy="prefix",
        repeat=0,
        measurements=[request(0.1), request(9.0, error="HTTP 503")],
        counters={},
    )
    [row] = result_rows([failed])
    assert (row["requests"], row["failed"], row["errors"]) == (2, 1, {"HTTP 503": 1})
    assert ttft_ms([failed], "chat")["prefix"] == pytest.approx([100])


@pytest.mark.parametrize(("round_robin_s", "is_met"), [(0.7, True), (0.5, False)])
def test_the_goal_for_shared_prefixes_is_three_times_round_robin(round_robin_s, is_met):
    runs = [run("shared prefix", "prefix", [0.2]), run("shared prefix", "round_robin", [round_robin_s])]
    [sentence] = verdicts(result_rows(runs))
    assert f"{round_robin_s / 0.2:.2f} times" in sentence
    assert ("NOT met" not in sentence) == is_met


@pytest.mark.parametrize(("prefix_s", "is_met"), [(0.208, True), (0.212, False)])
def test_without_sharing_the_best_simple_policy_is_the_measure(prefix_s, is_met):
    runs = [
        run("no sharing", "prefix", [prefix_s]),
        run("no sharing", "round_robin", [0.3]),
        run("no sharing", "least_loaded", [0.2]),
    ]
    [sentence] = verdicts(result_rows(runs))
    assert ("NOT met" not in sentence) == is_met


def test_nothing_is_said_of_a_goal_that_was_not_measured():
    assert verdicts(result_rows([run("chat", "prefix", [0.1])])) == []


def test_loads_are_the_same_for_every_policy_and_differ_between_repeats():
    sizes = Sizes().quick()
    assert build_loads(LOAD_NAMES, sizes, 0) == build_loads(LOAD_NAMES, sizes, 0)
    for first, second in zip(
        build_loads(LOAD_NAMES, sizes, 0), build_loads(LOAD_NAMES, sizes, 1), strict=True
    ):
        assert first.sessions != second.sessions
        assert len(first.sessions) == len(first.arrivals_s)
        assert first.arrivals_s == sorted(first.arrivals_s)


def test_the_working_set_fits_in_two_workers_and_not_in_one():
    sizes = Sizes()
    assert sizes.worker_blocks < sizes.working_set_blocks < 2 * sizes.worker_blocks
    assert sizes.prefix_len / sizes.prompt_len == pytest.approx(0.8)


def test_policies_take_turns_to_begin():
    assert [in_turn(POLICIES, repeat)[0] for repeat in range(4)] == [*POLICIES, POLICIES[0]]
    assert sorted(in_turn(POLICIES, 2)) == sorted(POLICIES)


def test_samples_of_a_page_are_summed_over_labels():
    text = '# HELP a b\n# TYPE a counter\na_total{x="1"} 2.0\na_total{x="2"} 3.5\nb 1e-05\n'
    assert parse_counters(text) == {"a_total": 5.5, "b": 1e-05}
    assert parse_counters(text, 'x="2"') == {"a_total": 3.5}
