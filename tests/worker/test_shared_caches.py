from __future__ import annotations

import asyncio

import pytest

from engine.kv_cache import AttachedKvCache, KvCache
from engine.kv_layout import KvLayout
from proto.prefill_pb2 import SharedKvCache
from servicekit.errors import HandoffFailed
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout
from tests.fakes.fake_workers import decode_worker, greedy_spec, prefill_worker, router_link
from worker.shared_caches import SharedCaches

LAYOUT = fake_kv_layout()


class _Attachments:
    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.all_closed = asyncio.Event()

    def __call__(self, name: str, layout: KvLayout, num_blocks: int) -> AttachedKvCache:
        attachments = self

        class Attached(AttachedKvCache):
            def close(self) -> None:
                super().close()
                attachments.closed.append(name)
                attachments.all_closed.set()

        self.opened.append(name)
        return Attached(name, layout, num_blocks)


@pytest.fixture
def owner():  # type: ignore[no-untyped-def]
    cache = KvCache(LAYOUT, 8, is_shared=True)
    yield cache
    cache.close()


def _named(owner: KvCache) -> SharedKvCache:
    return SharedKvCache(name=owner.shared_name, size_bytes=owner.size_bytes, num_blocks=8)


async def test_cache_is_attached_once_for_many_hand_offs(owner: KvCache) -> None:
    attachments = _Attachments()
    caches = SharedCaches(LAYOUT, attach=attachments)
    for _ in range(3):
        with caches.cache(_named(owner), "a:1") as one, caches.cache(_named(owner), "a:1") as other:
            assert one is other
    assert (len(attachments.opened), attachments.closed) == (1, [])

    caches.close()
    assert attachments.closed == attachments.opened


async def test_cache_that_nobody_uses_any_more_is_closed(owner: KvCache) -> None:
    attachments = _Attachments()
    caches = SharedCaches(LAYOUT, attach=attachments, idle_s=0.0)
    with caches.cache(_named(owner), "a:1") as cache:
        await asyncio.sleep(0)
        assert bytes(cache.read_blocks(0, 1, [0])) == bytes(owner.read_blocks(0, 1, [0]))
    await attachments.all_closed.wait()

    with caches.cache(_named(owner), "a:1"):
        assert len(attachments.opened) == 2
    caches.close()


async def test_size_that_does_not_fit_the_layout_is_refused(owner: KvCache) -> None:
    caches = SharedCaches(LAYOUT)
    named = _named(owner)
    named.size_bytes += 1

    with pytest.raises(HandoffFailed, match="8 blocks are"), caches.cache(named, "a:1"):
        pass
    assert not caches.can_attach("a:1")
    assert caches.can_attach("b:1")


async def test_worker_whose_cache_cannot_be_attached_streams_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_access(name: str, layout: KvLayout, num_blocks: int) -> AttachedKvCache:
        raise PermissionError("another process namespace")

    monkeypatch.setattr(SharedCaches.__init__, "__kwdefaults__", {"attach": no_access, "idle_s": 1.0})
    prompt = list(range(1, 30))
    async with (
        prefill_worker(build_fake_engine(is_shared=True), host_id="one") as prefill,
        decode_worker(build_fake_engine(), host_id="one", accepts_shared_memory=True) as decode,
        router_link(decode) as router,
    ):
        first = await router.finish(greedy_spec(prompt, 4, cache_salt="a"), prefill)
        second = await router.finish(greedy_spec(prompt, 4, cache_salt="b"), prefill)

        assert first.timings.prefill_fell_back
        assert not second.timings.prefill_fell_back
        assert first.token_ids == second.token_ids == expected_tokens(prompt, 4)
        await decode.until_idle()
        assert decode.metric("baton_handoff_bytes_total", carrier="stream") > 0
