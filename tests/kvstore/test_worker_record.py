from __future__ import annotations

import json

import pytest

from kvstore.worker_record import KvRate, WorkerLoad, WorkerRecord
from tests.fakes.redis_server import worker_record


def test_a_record_survives_json() -> None:
    record = worker_record(is_draining=True, load=WorkerLoad(num_waiting=3, prefill_tokens_per_s=1234.5))
    assert WorkerRecord.from_json(record.to_json()) == record


def test_fields_of_a_newer_version_are_ignored() -> None:
    values = json.loads(worker_record().to_json())
    values["num_wheels"] = 4
    values["load"]["temperature"] = 37.0
    assert WorkerRecord.from_json(json.dumps(values)) == worker_record()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"load": {}}', "null", '{"load": []}'])
def test_anything_else_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        WorkerRecord.from_json(text)


def test_measured_rates_survive_json() -> None:
    rates = {
        "stream": KvRate(bytes_per_s=1e9, latency_s=0.002),
        "disk": KvRate(bytes_per_s=0.0, latency_s=1.0),
    }
    record = worker_record(load=WorkerLoad(step_s=0.01, prefill_token_s=None, kv_rates=rates))
    assert WorkerRecord.from_json(record.to_json()) == record


def test_rates_of_a_newer_version_are_kept_as_far_as_they_are_known() -> None:
    values = json.loads(worker_record().to_json())
    values["load"]["kv_rates"] = {"tape": {"bytes_per_s": 5.0, "latency_s": 60.0, "colour": "red"}}
    record = WorkerRecord.from_json(json.dumps(values))
    assert record.load.kv_rates == {"tape": KvRate(bytes_per_s=5.0, latency_s=60.0)}
    values["load"]["kv_rates"] = ["stream"]
    with pytest.raises(ValueError, match="not a worker record"):
        WorkerRecord.from_json(json.dumps(values))
