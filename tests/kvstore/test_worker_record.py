from __future__ import annotations

import json

import pytest

from kvstore.worker_record import WorkerLoad, WorkerRecord
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
