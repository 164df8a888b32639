from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kvstore.memory_registry import MemoryRegistry
from kvstore.worker_record import WorkerLoad, WorkerRecord
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from tests.fakes.fake_decode_worker import decode_record

MODEL = {"model_name": "tiny"}


class _Link:
    is_up = True


def _record(worker_id: str, role: Any, **fields: Any) -> WorkerRecord:
    return replace(decode_record(worker_id, "127.0.0.1:1"), role=role, num_blocks=100, **fields)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(MemoryRegistry())


def test_workers_are_counted_by_what_the_router_would_do_with_them(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    FleetMetrics(registry, {"tiny": fleet}, lambda: True)
    workers = [
        (_record("p0", "prefill"), None),
        (_record("p1", "prefill", incarnation="suspect"), None),
        (_record("d0", "decode", load=WorkerLoad(num_waiting=3, num_free_blocks=50)), _Link()),
        (_record("d1", "decode", load=WorkerLoad(num_waiting=1, num_free_blocks=75)), None),
        (_record("d2", "decode", is_draining=True, load=WorkerLoad(num_free_blocks=100)), _Link()),
    ]
    monkeypatch.setattr(fleet, "workers", lambda: workers)
    monkeypatch.setattr(fleet, "is_suspected", lambda record: record.incarnation == "suspect")

    def workers_in(role: str, state: str) -> float | None:
        return registry.get_sample_value(
            "baton_router_workers", {**MODEL, "worker_role": role, "state": state}
        )

    assert workers_in("prefill", "ready") == 1
    assert workers_in("prefill", "suspected") == 1
    assert workers_in("decode", "ready") == 1
    assert workers_in("decode", "unlinked") == 1
    assert workers_in("decode", "draining") == 1
    assert registry.get_sample_value("baton_router_waiting_sequences", MODEL) == 4
    assert registry.get_sample_value("baton_router_kv_usage_ratio", MODEL) == pytest.approx(0.25)


def test_an_empty_fleet_is_zeros_and_not_silence(fleet: Fleet) -> None:
    registry = CollectorRegistry()
    FleetMetrics(registry, {"tiny": fleet}, lambda: False)
    labels = {**MODEL, "worker_role": "prefill", "state": "ready"}
    assert registry.get_sample_value("baton_router_workers", labels) == 0
    assert registry.get_sample_value("baton_router_kv_usage_ratio", MODEL) == 0
    assert registry.get_sample_value("baton_router_store_up") == 0


async def test_a_fleet_that_no_longer_follows_its_registry_has_failed() -> None:
    class Broken(MemoryRegistry):
        async def watch(self) -> Any:
            raise RuntimeError("not a listing")
            yield

    fleet = Fleet(Broken())
    assert not fleet.has_failed
    fleet.start()
    assert fleet._task is not None
    with pytest.raises(RuntimeError):
        await fleet._task
    assert fleet.has_failed
    await fleet.stop()
