"""Router, decode and prefill together: what a router sees on its link."""

from __future__ import annotations

from typing import Any

import pytest

from proto import common_pb2
from tests.fakes.fake_model import build_fake_engine, expected_tokens
from tests.fakes.fake_workers import decode_worker, greedy_spec, prefill_worker, router_link

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]


@pytest.mark.parametrize("is_shared", [False, True])
async def test_handed_off_request_gives_the_tokens_of_the_model(is_shared: bool) -> None:
    async with (
        prefill_worker(build_fake_engine(is_shared=is_shared), host_id="one") as prefill,
        decode_worker(build_fake_engine(), host_id="one", accepts_shared_memory=is_shared) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 20), prefill)

        assert reply.token_ids == expected_tokens(PROMPT, 20)
        assert reply.last.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert reply.timings.prefill_worker_id == "prefill-a"
        assert not reply.timings.prefill_fell_back
        assert reply.timings.transfer_bytes == 12 * decode.engine.engine.kv_layout.block_bytes
        carrier = "shared_memory" if is_shared else "stream"
        await decode.until_idle()
        assert decode.metric("baton_handoff_bytes_total", carrier=carrier) == reply.timings.transfer_bytes
        rate = decode.transfers.rates.kv_rates()[carrier]  # type: ignore[index]
        assert rate.latency_s > 0 or rate.bytes_per_s > 0
        await decode.until_idle()
        await prefill.until_idle()
        assert prefill.metric("baton_prefill_requests_total", outcome="committed") == 1


async def test_the_rate_of_a_handoff_is_known_before_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So no wait for the step that the engine is in can be part of it."""
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        engine, known = decode.engine.engine, []
        commit = engine.commit

        def commit_and_look(*args: Any) -> Any:
            known.append(set(decode.transfers.rates.kv_rates()))
            return commit(*args)

        monkeypatch.setattr(engine, "commit", commit_and_look)
        await router.finish(greedy_spec(PROMPT, 4), prefill)
        assert known == [{"stream"}]
        await decode.until_idle()
        await prefill.until_idle()


async def test_decode_prefills_by_itself_without_a_prefill_worker() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        reply = await router.finish(greedy_spec(PROMPT, 6))

        assert reply.token_ids == expected_tokens(PROMPT, 6)
        assert reply.timings.prefill_worker_id == ""
