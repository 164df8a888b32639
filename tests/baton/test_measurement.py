import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.measurement import Distribution, RequestMeasurement, by_class, percentile, summarize


def measurement(sent_at=0.0, chunk_times=(0.1, 0.2, 0.4), num_output_tokens=3, **fields):
    return RequestMeasurement(
        sent_at=sent_at, chunk_times=list(chunk_times), num_output_tokens=num_output_tokens, **fields
    )


def test_latency_terms_of_one_request_follow_the_definitions():
    request = measurement(sent_at=1.0, chunk_times=[1.5, 1.7, 2.1], num_output_tokens=3)
    assert request.ttft_s == pytest.approx(0.5)
    assert request.e2e_s == pytest.approx(1.1)
    assert request.tpot_s == pytest.approx(0.3)
    assert request.itl_s == pytest.approx([0.2, 0.4])


def test_a_chunk_of_several_tokens_is_one_gap_and_zeros():
    request = measurement(chunk_times=[0.1, 0.4], num_output_tokens=5)
    assert sorted(request.itl_s) == pytest.approx([0.0, 0.0, 0.0, 0.3])
    assert request.tpot_s == pytest.approx(0.3 / 4)


def test_a_single_token_has_no_tpot_and_no_gap():
    request = measurement(chunk_times=[0.1], num_output_tokens=1)
    assert request.tpot_s is None
    assert request.itl_s == []


def test_percentiles_lie_between_the_nearest_ranks():
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 100) == 4.0
    assert percentile([7.0], 99) == 7.0


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_percentiles_rise_and_stay_within_the_values(values):
    d = Distribution.of_seconds(values)
    ordered = [min(values) * 1000, d.p50, d.p90, d.p95, d.p99, d.max]
    assert all(a <= b or math.isclose(a, b) for a, b in zip(ordered, ordered[1:], strict=False))


def test_goodput_counts_requests_within_both_limits():
    fast = measurement(chunk_times=[0.1, 0.2], num_output_tokens=2)
    late = measurement(chunk_times=[0.9, 1.0], num_output_tokens=2)
    slow = measurement(chunk_times=[0.1, 1.0], num_output_tokens=2)
    summary = summarize([fast, late, slow], slo_ttft_ms=500, slo_tpot_ms=500)
    assert summary.goodput_per_s == pytest.approx(1.0)


def test_failed_requests_are_counted_by_reason_and_kept_out_of_the_rates():
    good = measurement(num_output_tokens=3, num_prompt_tokens=7)
    bad = measurement(num_output_tokens=1, num_prompt_tokens=7, error="HTTP 503: full")
    empty = measurement(chunk_times=[], num_output_tokens=0)
    summary = summarize([good, bad, empty])
    assert summary.num_failed == 2
    assert summary.errors == {"HTTP 503: full": 1, "no token came": 1}
    assert (summary.num_output_tokens, summary.num_prompt_tokens) == (3, 7)
    assert summary.output_tokens_per_s == pytest.approx(3 / 0.4)
    assert summary.goodput_per_s is None


def test_goodput_of_a_class_is_a_part_of_the_whole_run():
    chat = [
        measurement(sent_at=float(at), chunk_times=[at + 0.1, at + 0.2], class_name="chat") for at in range(4)
    ]
    long = [measurement(sent_at=0.0, chunk_times=[2.0, 7.9], class_name="long")]
    whole = summarize(chat + long, slo_ttft_ms=500, slo_tpot_ms=500)
    classes = by_class(long + chat)
    assert list(classes) == ["chat", "long"]
    parts = {
        name: summarize(own, slo_ttft_ms=500, slo_tpot_ms=500, duration_s=whole.duration_s)
        for name, own in classes.items()
    }
    assert whole.duration_s == pytest.approx(7.9)
    assert parts["chat"].goodput_per_s == pytest.approx(4 / 7.9)
    assert parts["long"].goodput_per_s == 0
    assert whole.goodput_per_s == pytest.approx(sum(part.goodput_per_s for part in parts.values()))


def test_requests_without_a_class_are_in_none():
    assert by_class([measurement()]) == {}
