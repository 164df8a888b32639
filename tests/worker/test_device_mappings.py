"""Mappings of other workers' caches: one owner each, which closes them whatever happens. Shared memory files
stand in for memory of a device."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from engine.kv_cache import AttachedKvCache, KvCache
from engine.kv_export import KvExport
from proto.prefill_pb2 import DeviceKvCache
from tests.fakes.fake_model import fake_kv_layout
from worker.device_mappings import DeviceMappings, export_from_pb, export_to_pb

LAYOUT = fake_kv_layout()
WAIT_S = 20.0


class Opener:
    """Opens for real, and keeps count."""

    def __init__(self) -> None:
        self.num_opened = 0
        self.open: list[str] = []  # names
        self.may_open = threading.Event()
        self.may_open.set()
        self._here = KvCache(LAYOUT, 1)

    def __call__(self, exported: KvExport) -> AttachedKvCache:
        opener = self
        assert self.may_open.wait(WAIT_S)

        class Opened(AttachedKvCache):
            def close(self) -> None:
                super().close()
                opener.open.remove(exported.name)

        self._here.open_peer(exported).close()  # what it raises is raised
        self.num_opened += 1
        self.open.append(exported.name)
        return Opened(exported.memory.handle.decode(), LAYOUT, exported.num_blocks)


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def owners() -> Iterator[Callable[[], KvCache]]:
    made: list[KvCache] = []

    def make() -> KvCache:
        made.append(KvCache(LAYOUT, 8, is_shared=True))
        made[-1].export()
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def offer(owner: KvCache, **changes: object) -> DeviceKvCache:
    assert owner.exported is not None
    offer_pb = export_to_pb(owner.exported)
    for name, value in changes.items():
        setattr(offer_pb, name, value)
    return offer_pb


def is_mapped(mappings: DeviceMappings, address: str) -> str | None:
    with mappings.mapped(address) as mapped:
        return None if mapped is None else mapped.name


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def test_an_offer_says_the_same_on_the_other_side(owners: Callable[[], KvCache]) -> None:
    owner = owners()
    assert owner.exported is not None
    assert export_from_pb(DeviceKvCache.FromString(offer(owner).SerializeToString())) == owner.exported
    assert owner.exported.name != owners().exported.name  # type: ignore[union-attr]


async def test_a_cache_is_opened_once_beside_the_loop_and_read_by_many(
    opener: Opener, owners: Callable[[], KvCache]
) -> None:
    owner, mappings = owners(), DeviceMappings(opener)
    owner.data.fill_(3)
    opener.may_open.clear()
    for _ in range(3):
        mappings.offered(offer(owner), "a:1")
    assert is_mapped(mappings, "a:1") is None
    opener.may_open.set()
    await until(lambda: is_mapped(mappings, "a:1") is not None)

    with mappings.mapped("a:1") as one, mappings.mapped("a:1") as other:
        assert one is other is not None
        target = KvCache(LAYOUT, 4)
        target.copy_blocks(one.cache, 1, 2, [7, 2], [0, 3])
        assert bytes(target.read_blocks(1, 2, [0, 3])) == bytes(owner.read_blocks(1, 2, [7, 2]))
        assert not any(target.read_blocks(0, 3, [1, 2]))
    assert is_mapped(mappings, "b:1") is None
    assert (opener.num_opened, len(opener.open)) == (1, 1)
    await mappings.close()
    assert opener.open == []


async def test_a_worker_that_started_anew_takes_the_place_of_the_old_one_once_nobody_reads_that(
    opener: Opener, owners: Callable[[], KvCache]
) -> None:
    old, new, mappings = owners(), owners(), DeviceMappings(opener)
    mappings.offered(offer(old), "a:1")
    await until(lambda: is_mapped(mappings, "a:1") is not None)
    with mappings.mapped("a:1") as mapped:
        mappings.offered(offer(new), "a:1")
        await until(lambda: is_mapped(mappings, "a:1") == new.exported.name)  # type: ignore[union-attr]
        assert mapped is not None
        assert mapped.name in opener.open
        KvCache(LAYOUT, 4).copy_blocks(mapped.cache, 0, 1, [0], [0])
    await until(lambda: len(opener.open) == 1)
    await mappings.close()
    assert opener.open == []


@pytest.mark.parametrize("is_reaped", [True, False])
async def test_a_mapping_ends_with_its_owner_but_not_under_a_reader(
    opener: Opener, owners: Callable[[], KvCache], is_reaped: bool
) -> None:
    owner, mappings = owners(), DeviceMappings(opener, watch_s=0.01)
    with process() as running:
        mappings.offered(offer(owner, pid=running.pid), "a:1")
        await until(lambda: is_mapped(mappings, "a:1") is not None)
        await asyncio.sleep(0.05)
        assert is_mapped(mappings, "a:1") is not None
        with mappings.mapped("a:1") as mapped:
            running.kill()
            if is_reaped:
                running.wait()
            await until(lambda: is_mapped(mappings, "a:1") is None)
            assert mapped is not None
            KvCache(LAYOUT, 4).copy_blocks(mapped.cache, 0, 1, [0], [0])
        await until(lambda: opener.open == [])
    await mappings.close()


async def test_what_cannot_be_opened_is_tried_once_and_told_once(
    opener: Opener, owners: Callable[[], KvCache], caplog: pytest.LogCaptureFixture
) -> None:
    owner, gone, mappings = owners(), owners(), DeviceMappings(opener)
    gone_pb = offer(gone)
    gone.close()
    with process() as running:
        dead_pid = running.pid
    refused = {
        "gone": gone_pb,
        "device": offer(owner, name="d1", device_uuid="GPU-1"),
        "dead": offer(owner, name="d2", pid=dead_pid),
        "size": offer(owner, name="d3", num_blocks=9),
        "handle": offer(owner, name="d4", handle=b"\xff"),
    }
    for address, offer_pb in refused.items():
        mappings.offered(offer_pb, address)
        await until(lambda: not mappings._tasks)
        mappings.offered(offer_pb, address)
        assert not mappings._tasks
        assert is_mapped(mappings, address) is None
    told = [record for record in caplog.records if record.getMessage() == "device_memory_refused"]
    fields = [record.fields for record in told]  # type: ignore[attr-defined]
    assert [f["peer_address"] for f in fields] == list(refused)
    assert all(f["reason"] for f in fields)
    assert opener.open == []
    await mappings.close()


async def test_close_waits_for_what_is_being_opened(opener: Opener, owners: Callable[[], KvCache]) -> None:
    mappings = DeviceMappings(opener)
    opener.may_open.clear()
    mappings.offered(offer(owners()), "a:1")
    closing = asyncio.create_task(mappings.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    opener.may_open.set()
    await closing
    assert (opener.num_opened, opener.open) == (1, [])
    mappings.offered(offer(owners()), "b:1")
    assert not mappings._tasks
