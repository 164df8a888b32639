from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from kvstore.worker_record import KvRate, WorkerLoad
from router.worker_rates import ASSUMED, KvCost, resolve_rates
from tests.fakes.fake_decode_worker import decode_record


def record(worker_id: str, **load: Any) -> Any:
    return decode_record(worker_id, "127.0.0.1:1", load=WorkerLoad(**load), block_bytes=400)


def test_before_anybody_has_measured_everything_is_assumed() -> None:
    [rates] = resolve_rates([record("a")])
    assert rates.token_bytes == 100
    assert (rates.step_s, rates.prefill_token_s, rates.peer) == (
        ASSUMED.step_s,
        ASSUMED.prefill_token_s,
        ASSUMED.peer,
    )


def test_a_worker_that_has_not_measured_is_taken_for_a_middle_one() -> None:
    records = [record(str(s), prefill_token_s=s) for s in (0.1, 0.2, 0.4)]
    rates = resolve_rates([*records, record("new")])
    assert [each.prefill_token_s for each in rates] == [0.1, 0.2, 0.4, 0.2]


def test_nearly_equal_rates_are_equal() -> None:
    rates = resolve_rates([record(str(s), step_s=s) for s in (0.100, 0.095, 0.110, 0.2)])
    assert [each.step_s for each in rates] == [0.1, 0.1, 0.1, 0.2]


def test_workers_on_the_processors_of_one_host_are_equally_fast() -> None:
    def on(worker_id: str, host_id: str, cpu_share: float, step_s: float | None) -> Any:
        return replace(record(worker_id, step_s=step_s), host_id=host_id, cpu_share=cpu_share)

    shared = [on("a", "h", 0.5, 0.1), on("b", "h", 0.5, 0.3), on("c", "h", 0.5, None), on("d", "h", 0.5, 0.9)]
    others = [on("wider", "h", 1.0, 0.04), on("elsewhere", "i", 0.5, 1.6), on("device", "h", 0.0, 0.02)]
    steps = [rates.step_s for rates in resolve_rates([*shared, *others])]
    assert steps == [0.3, 0.3, 0.3, 0.3, 0.04, 1.6, 0.02]


def test_an_older_worker_s_mean_rate_stands_in() -> None:
    [rates] = resolve_rates([record("a", prefill_tokens_per_s=500.0)])
    assert rates.prefill_token_s == pytest.approx(0.002)


def test_kv_rates_are_taken_by_path() -> None:
    load = {"kv_rates": {"disk": KvRate(bytes_per_s=1e6, latency_s=0.5)}}
    [rates] = resolve_rates([record("a", **load)])
    assert rates.disk == KvCost(0.5, 1e-6)
    assert rates.host == ASSUMED.host


@pytest.mark.parametrize("nonsense", [-1.0, float("nan"), float("inf")])
def test_nonsense_is_not_measured(nonsense: float) -> None:
    kv_rates = {"peer": KvRate(bytes_per_s=0.0, latency_s=nonsense)}
    [rates] = resolve_rates([record("a", step_s=nonsense, prefill_token_s=nonsense, kv_rates=kv_rates)])
    assert (rates.step_s, rates.prefill_token_s) == (ASSUMED.step_s, ASSUMED.prefill_token_s)
    assert rates.peer == ASSUMED.peer


def test_the_order_of_the_records_does_not_matter() -> None:
    records = [record(str(s), decode_seq_s=s / 7) for s in range(1, 20)]
    by_id = {r.worker_id: rates for r, rates in zip(records, resolve_rates(records), strict=True)}
    random.Random(1).shuffle(records)
    assert [by_id[r.worker_id] for r in records] == resolve_rates(records)
