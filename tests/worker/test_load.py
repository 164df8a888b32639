"""What a worker says about its load and its speed."""

from __future__ import annotations

import pytest

from engine.outputs import StepOutput, StepStats
from kvstore.worker_record import KvRate
from worker.admission import Admission
from worker.fetch_rates import FetchRates
from worker.load import LoadMeter
from worker.transfer_rates import TransferRates


def step(
    num_prefill_tokens: int, num_decode_tokens: int, step_s: float, *, is_idle: bool = False
) -> StepOutput:
    stats = StepStats(
        num_prefill_tokens=num_prefill_tokens,
        num_decode_tokens=num_decode_tokens,
        num_running=3,
        num_waiting=0,
        num_waiting_tokens=70,
        num_free_blocks=5,
        num_cached_blocks=6,
        num_used_blocks=7,
        num_preemptions=0,
        num_hit_tokens=0,
        num_queried_tokens=0,
        step_s=step_s,
        is_idle_step=is_idle,
    )
    return StepOutput(outputs=[], stats=stats)


def meter() -> LoadMeter:
    return LoadMeter(Admission(max_requests=8), num_blocks=18)


def test_nothing_is_claimed_before_it_was_measured() -> None:
    load = meter().load()
    assert (load.step_s, load.prefill_token_s, load.decode_seq_s) == (None, None, None)
    assert load.kv_rates == {}
    assert load.prefill_tokens_per_s == 0


def test_steps_tell_what_a_token_and_a_sequence_take() -> None:
    load_meter = meter()
    for num_prefill_tokens, num_decode_tokens in [(0, 1), (0, 4), (100, 2), (300, 0), (0, 8)] * 30:
        step_s = 0.01 + 0.002 * num_prefill_tokens + 0.001 * num_decode_tokens
        load_meter.observe(step(num_prefill_tokens, num_decode_tokens, step_s))
        load_meter.observe(step(0, 0, 5.0, is_idle=True))  # waited for other ranks
    load = load_meter.load()
    assert load.step_s == pytest.approx(0.01, rel=0.02)
    assert load.prefill_token_s == pytest.approx(0.002, rel=0.02)
    assert load.decode_seq_s == pytest.approx(0.001, rel=0.02)
    assert (load.num_running, load.num_waiting_tokens, load.num_free_blocks) == (3, 70, 11)


def test_prompt_tokens_are_never_free() -> None:
    load_meter = meter()
    for _ in range(20):  # more tokens, less time
        load_meter.observe(step(10, 0, 0.5))
        load_meter.observe(step(100, 0, 0.1))
    load = load_meter.load()
    assert load.prefill_token_s is not None
    assert load.prefill_token_s * load.prefill_tokens_per_s >= 0.09


def test_rates_of_transfers_and_fetches_are_told() -> None:
    load_meter, transfers, fetches = meter(), TransferRates(), FetchRates()
    load_meter.add_kv_rates(transfers.kv_rates)
    load_meter.add_kv_rates(fetches.kv_rates)
    for num_bytes in (0, 1_000_000, 5_000_000, 20_000_000):
        transfers.observe("stream", num_bytes, 0.004 + num_bytes / 1e9)
    fetches.observe(1_000_000, latency_s=0.01, transfer_s=0.1)
    rates = load_meter.load().kv_rates
    assert set(rates) == {"stream", "peer"}
    assert rates["stream"].bytes_per_s == pytest.approx(1e9, rel=0.05)
    assert rates["stream"].latency_s == pytest.approx(0.004, rel=0.05)
    assert rates["peer"] == KvRate(bytes_per_s=pytest.approx(1e7), latency_s=pytest.approx(0.01))


def test_hand_offs_that_hid_every_byte_tell_no_speed() -> None:
    transfers = TransferRates()
    transfers.observe("shared_memory", 0, 0.003)
    rate = transfers.kv_rates()["shared_memory"]
    assert (rate.bytes_per_s, rate.latency_s) == (0, pytest.approx(0.003, rel=0.01))


def test_bytes_that_seem_to_cost_nothing_have_a_speed_all_the_same() -> None:
    transfers = TransferRates()
    for num_bytes in (1, 10_000_000) * 20:
        transfers.observe("shared_memory", num_bytes, 0.003 if num_bytes == 1 else 0.001)
    assert transfers.kv_rates()["shared_memory"].bytes_per_s <= 1e12
