import pytest

from baton.bench.measurement import RequestMeasurement
from benchmarks.redis_outage import Times, hit_rate, hit_rate_over_time, phase_rows

TIMES = Times(killed_s=10, back_s=20, end_s=30)


def request(second, num_hit_tokens=0, error=None):
    """Sent then, on a clock that began at 1000."""
    return RequestMeasurement(
        sent_at=1000.0 + second,
        chunk_times=[1000.2 + second],
        num_prompt_tokens=100,
        num_output_tokens=1,
        num_hit_tokens=num_hit_tokens,
        error=error,
    )


def test_requests_belong_to_the_phase_in_which_they_were_sent():
    requests = [request(0, 80), request(9.9, 40), request(10, 20), request(20), request(31, 60)]
    before, away, back = phase_rows(requests, TIMES)
    assert [row["requests"] for row in (before, away, back)] == [2, 1, 2]
    assert [row["hit rate"] for row in (before, away, back)] == pytest.approx([0.6, 0.2, 0.3])
    assert before["TTFT p50 ms"] == pytest.approx(200)


def test_failed_requests_are_counted_and_do_not_change_the_hit_rate():
    _, away, back = phase_rows([request(0), request(12, 50), request(13, 0, "HTTP 503")], TIMES)
    assert (away["failed"], away["errors"], away["hit rate"]) == (1, {"HTTP 503": 1}, 0.5)
    assert (back["requests"], back["failed"], back["hit rate"]) == (0, 0, None)


def test_the_hit_rate_over_time_leaves_empty_bins_out():
    requests = [request(0, 10), request(4, 30), request(11, 100), request(12, 0, "gone")]
    assert hit_rate_over_time(requests, bin_s=5) == [(2.5, pytest.approx(0.2)), (12.5, pytest.approx(1.0))]


def test_nothing_served_has_no_hit_rate():
    assert hit_rate([request(0, 0, "gone")]) is None
