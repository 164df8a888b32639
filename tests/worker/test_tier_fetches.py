"""Workers with tiers: what one has anywhere another fetches, and each loads what it has itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.kv_cache import KvCache
from kvstore.block_hash import BlockTier
from proto.prefill_pb2 import KvChunk
from servicekit.frames import Frame
from tests.engine.tiers.tier_driver import FixedPlanner, lower_tiers
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.fake_workers import (
    FakeWorker,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)
from worker import fetch_call, kv_frames, peer_source
from worker.fetch_limit import FetchLimit
from worker.kv_carrier import SharedMemoryCarrier
from worker.kv_frames import FrameKind, read_header

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]  # 11 full blocks of 4


def _engine(num_compute_blocks: int, *, num_slots: int = 0, directory: Path | None = None) -> Engine:
    tiers = lower_tiers(num_slots, directory) if num_slots or directory else None
    engine = build_fake_engine(num_blocks=24, token_budget=20, max_running=4, growth_tokens=4, tiers=tiers)
    engine._scheduler.loads.planner = FixedPlanner(num_compute_blocks)
    return engine


async def _ask(
    worker: FakeWorker, prompt: list[int], peer: FakeWorker | None = None, prefill: FakeWorker | str = ""
) -> Reply:
    async with router_link(worker) as router:
        offered = None if peer is None else peer.as_peer(len(prompt) // 4)
        reply = await router.finish(greedy_spec(prompt, 4), prefill, offered)
    assert reply.token_ids == expected_tokens(prompt, 4)
    await worker.until_idle()
    return reply


async def _settle(worker: FakeWorker) -> None:
    """Until every block is where it goes."""
    async with asyncio.timeout(10):
        while not await worker.engine.call(lambda engine: engine._tiers.is_idle):
            pass


async def _evict(worker: FakeWorker) -> None:
    for first in (1, 2):
        await _ask(worker, [first] * 81)
    await _settle(worker)


@pytest.mark.parametrize("num_compute_blocks", [0, 2])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_prefix_of_a_peer_is_fetched_while_its_front_is_computed(
    num_compute_blocks: int, is_shared: bool
) -> None:
    holder_engine = build_fake_engine(is_shared=is_shared)
    facts = {"accepts_shared_memory": is_shared}
    async with (
        decode_worker(holder_engine, worker_id="holder", fetch_limit=FetchLimit(1 << 10)) as holder,
        decode_worker(_engine(num_compute_blocks), worker_id="reader", **facts) as reader,  # type: ignore[arg-type]
    ):
        await _ask(holder, PROMPT)
        timings = (await _ask(reader, PROMPT, holder)).timings

        assert timings.num_fetched_tokens % 4 == 0 and timings.num_loaded_tokens == 0
        assert timings.num_hit_tokens == timings.num_fetched_tokens
        if num_compute_blocks == 0:
            assert timings.num_fetched_tokens == 44
            assert reader.metric("baton_fetch_blocks_total") == 11
        # It has them now.
        assert (await _ask(reader, PROMPT)).timings.num_hit_tokens == 44


async def test_peer_that_is_gone_costs_no_token() -> None:
    async with decode_worker(_engine(0), worker_id="reader") as reader:
        async with decode_worker(build_fake_engine(), worker_id="holder") as holder:
            await _ask(holder, PROMPT)
        timings = (await _ask(reader, PROMPT, holder)).timings
        assert timings.num_fetched_tokens == timings.num_hit_tokens == 0


@pytest.mark.parametrize("tier", [BlockTier.HOST, BlockTier.DISK])
async def test_blocks_in_a_lower_tier_are_fetched_too(tier: BlockTier, tmp_path: Path) -> None:
    tiers = {"num_slots": 64} if tier is BlockTier.HOST else {"directory": tmp_path}
    engine = _engine(0, **tiers)  # type: ignore[arg-type]
    async with (
        decode_worker(engine, worker_id="holder", fetch_limit=FetchLimit(1 << 10)) as holder,
        decode_worker(_engine(0), worker_id="reader") as reader,
    ):
        await _ask(holder, PROMPT)
        await _evict(holder)
        hashes = engine.hash_chain.hashes(PROMPT)
        assert await holder.engine.call(lambda e: e._tiers.places.lower_tier(hashes[10])) is tier
        assert await holder.engine.call(lambda e: e._pool.block_of(hashes[10])) is None

        timings = (await _ask(reader, PROMPT, holder)).timings
        assert timings.num_fetched_tokens == 44
        async with asyncio.timeout(10):
            while holder.kv_service.limit.num_fetches:
                await holder.engine.call(lambda engine: None)
        await holder.engine.call(Engine.check_integrity)
        stats = await holder.engine.call(lambda e: e._tiers.stats())
        assert [tier_stats.num_used_blocks for tier_stats in stats] == [0] * len(stats)


@pytest.mark.parametrize("is_accepted", [True, False])
async def test_workers_of_one_machine_read_each_other_s_host_memory(
    is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in host memory does not travel; what is on the device neither, in the same fetch."""
    monkeypatch.setattr(fetch_call, "TARGET_CHUNK_BYTES", 1)  # a block a message
    tiers = lower_tiers(64, None)
    engine = build_fake_engine(
        num_blocks=24, token_budget=20, max_running=4, growth_tokens=4, tiers=tiers, is_shared=True
    )
    frames: list[Frame] = []
    monkeypatch.setattr(peer_source, "next_frame", _recording(frames))
    async with (
        decode_worker(engine, worker_id="holder", fetch_limit=FetchLimit(1 << 10)) as holder,
        decode_worker(_engine(0), worker_id="reader", accepts_shared_memory=is_accepted) as reader,
    ):
        await _ask(holder, PROMPT)
        await _evict(holder)
        await _ask(holder, PROMPT[:9])  # two blocks are on the device again
        await _settle(holder)
        timings = (await _ask(reader, PROMPT, holder)).timings
        assert timings.num_fetched_tokens == 44
        assert engine.host_cache is not None and engine.host_cache.shared_name is not None

    chunks = [read_header(f, FrameKind.KV_CHUNK, KvChunk) for f in frames if f.kind == FrameKind.KV_CHUNK]
    sizes = [len(f.payload) for f in frames if f.kind == FrameKind.KV_CHUNK]
    if is_accepted:
        assert sizes == [0] * 11
        assert [chunk.is_in_host_memory for chunk in chunks] == [True] * 9 + [False] * 2
    else:
        assert all(sizes) and not any(chunk.source_block_ids for chunk in chunks)


def _recording(frames: list[Frame]) -> Callable[..., Coroutine[Any, Any, Frame]]:
    async def next_frame(*args: Any) -> Frame:
        frames.append(await kv_frames.next_frame(*args))
        return frames[-1]

    return next_frame


async def test_host_memory_that_was_not_offered_is_an_error() -> None:
    cache = build_fake_engine(is_shared=True).kv_cache
    chunk_pb = KvChunk(num_layers=1, num_blocks=1, source_block_ids=[3], is_in_host_memory=True)
    with pytest.raises(ValueError, match="not offered"):
        SharedMemoryCarrier(cache).unpack(chunk_pb, memoryview(b""))
    with pytest.raises(ValueError, match="outside a cache of 2"):
        host = KvCache(cache.layout, 2)
        SharedMemoryCarrier(cache, host).unpack(chunk_pb, memoryview(b""))


async def test_own_tiers_are_told_in_timings(tmp_path: Path) -> None:
    async with decode_worker(_engine(0, num_slots=64, directory=tmp_path)) as worker:
        await _ask(worker, PROMPT)
        await _evict(worker)
        timings = (await _ask(worker, PROMPT)).timings

        assert timings.num_loaded_tokens == timings.num_hit_tokens == 44
        assert timings.load_s > 0 and timings.num_fetched_tokens == 0
        await _settle(worker)


async def test_prefill_worker_hands_over_what_it_loaded() -> None:
    async with (
        prefill_worker(_engine(0, num_slots=64)) as prefill,
        decode_worker(_engine(0), worker_id="a") as first,
        decode_worker(_engine(0), worker_id="b") as second,
    ):
        await _ask(first, PROMPT, prefill=prefill)
        for value in (1, 2):
            await _ask(first, [value] * 81, prefill=prefill)
        await _settle(prefill)
        timings = (await _ask(second, PROMPT, prefill=prefill)).timings

        assert not timings.prefill_fell_back
        assert timings.num_loaded_tokens == timings.num_hit_tokens == 44
        await prefill.until_idle()


async def test_fetch_into_a_sequence_that_is_cancelled_leaves_nothing() -> None:
    async with (
        decode_worker(build_fake_engine(), worker_id="holder", fetch_limit=FetchLimit(1 << 10)) as holder,
        decode_worker(_engine(0), worker_id="reader") as reader,
    ):
        await _ask(holder, PROMPT)
        async with router_link(reader) as router:
            replies = []
            for _ in range(5):
                key, reply = await router.submit(greedy_spec(PROMPT, 4), "", holder.as_peer(11))
                await router.cancel(key)
                replies.append(reply)
            for reply in replies:  # else the worker may hear of some after the end of this link
                await reply.ended.wait()
        await reader.until_idle()
        await reader.engine.call(Engine.check_integrity)
        assert reader.engine.engine.load().num_used_blocks == 0
