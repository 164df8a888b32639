"""A peer that the router offers reaches whoever computes the prompt; what it saved is in the timings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from decode_svc.handoff import Handoff
from prefill_svc.prefill_call import PrefillCall
from proto import common_pb2
from proto.common_pb2 import KvPeer
from servicekit.errors import WorkerLost
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.fake_workers import decode_worker, greedy_spec, prefill_worker, router_link
from worker.peer_fetcher import PeerFetcher

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]
PEER = KvPeer(worker_id="peer", address="127.0.0.1:1", num_blocks=5)


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, KvPeer]]:
    """(who was offered a peer, the peer)"""
    seen: list[tuple[str, KvPeer]] = []
    honest = PeerFetcher.offered

    @contextmanager
    def offered(self: PeerFetcher, request_pb: Any, deadline: Any) -> Iterator[Any]:
        seen.append((self._worker_id, request_pb.peer))
        with honest(self, request_pb, deadline) as source:
            yield source

    monkeypatch.setattr(PeerFetcher, "offered", offered)
    return seen


async def test_hand_off_passes_the_peer_on(offers: list[tuple[str, KvPeer]]) -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 4), prefill, PEER)

        assert reply.token_ids == expected_tokens(PROMPT, 4)
        assert offers == [("prefill-a", PEER)]


async def test_local_prefill_is_offered_the_peer(offers: list[tuple[str, KvPeer]]) -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        reply = await router.finish(greedy_spec(PROMPT, 4), peer=PEER)

        assert reply.token_ids == expected_tokens(PROMPT, 4)
        assert offers == [("decode-a", PEER)]


async def test_prefill_that_fell_back_is_offered_the_peer(offers: list[tuple[str, KvPeer]]) -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        reply = await router.finish(greedy_spec(PROMPT, 4), "127.0.0.1:1", PEER)

        assert reply.token_ids == expected_tokens(PROMPT, 4)
        assert reply.timings.prefill_fell_back
        assert offers == [("decode-a", PEER)]


async def test_what_a_prefill_worker_loaded_is_told_to_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PrefillCall._pack_finished

    def loaded(self: PrefillCall, output: Any) -> bytes:
        for name, value in (("num_loaded_tokens", 8), ("num_fetched_tokens", 12), ("load_s", 0.5)):
            object.__setattr__(output, name, value)
        return honest(self, output)

    monkeypatch.setattr(PrefillCall, "_pack_finished", loaded)
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        timings = (await router.finish(greedy_spec(PROMPT, 4), prefill)).timings

        assert (timings.num_loaded_tokens, timings.num_fetched_tokens, timings.load_s) == (8, 12, 0.5)
        assert timings.num_hit_tokens == 20


async def test_cancellation_that_looks_like_a_lost_worker_starts_no_local_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """grpc.aio raises AioRpcError alone when a cancellation meets a refused connection."""
    entered = asyncio.Event()

    async def refused(self: Handoff, on_commit: object) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise WorkerLost("connection refused") from None

    monkeypatch.setattr(Handoff, "run", refused)
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        key, reply = await router.submit(greedy_spec(PROMPT, 4), "127.0.0.1:1")
        await entered.wait()
        await router.cancel(key)
        await reply.ended.wait()

        assert reply.last.finish_reason == common_pb2.FINISH_REASON_ABORTED
        assert reply.token_ids == []
        await decode.until_idle()
        assert decode.metric("baton_handoff_fallbacks_total", reason="WorkerLost") == 0
