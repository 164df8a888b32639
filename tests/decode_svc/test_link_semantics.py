"""What a request may ask for, and what its link guarantees."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from engine.forward_batch import ForwardBatch
from proto import common_pb2
from proto.link_pb2 import LinkRequest, Submit
from tests.fakes.fake_model import EOS_TOKEN_ID, build_fake_engine, expected_tokens
from tests.fakes.fake_workers import (
    GatedModel,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(45)]


def _prompt_followed_by_eos() -> list[int]:
    return next([n, 1] for n in range(1, 200) if expected_tokens([n, 1], 1) == [EOS_TOKEN_ID])


async def test_single_token_needs_no_kv_from_the_prefill_worker() -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        reply = await router.finish(greedy_spec(PROMPT, 1), prefill)

        assert reply.token_ids == expected_tokens(PROMPT, 1)
        assert reply.last.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert reply.timings.prefill_worker_id == "prefill-a"
        assert reply.timings.transfer_bytes == 0
        assert decode.engine.engine.load().num_cached_blocks == 0
        await prefill.until_idle()


@pytest.mark.parametrize("max_tokens", [1, 9])
async def test_end_of_sequence_as_first_token_ends_the_request(max_tokens: int) -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        spec = greedy_spec(_prompt_followed_by_eos(), max_tokens, sampling={"ignore_eos": False})
        reply = await router.finish(spec, prefill)

        assert reply.token_ids == [EOS_TOKEN_ID]
        assert reply.last.finish_reason == common_pb2.FINISH_REASON_STOP
        await decode.until_idle()
        await prefill.until_idle()


@pytest.mark.parametrize("is_handed_off", [False, True])
async def test_migrated_request_goes_on_where_it_was(is_handed_off: bool) -> None:
    whole = expected_tokens(PROMPT, 20)
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        spec = greedy_spec(PROMPT, 20, output_ids=whole[:7])
        reply = await router.finish(spec, prefill if is_handed_off else "")

        assert reply.token_ids == whole[7:]
        assert reply.last.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_logprobs_of_a_handed_off_request_equal_those_of_a_local_one() -> None:
    sampling = {"num_logprobs": 3, "num_prompt_logprobs": 2}
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        local = await router.finish(greedy_spec(PROMPT, 5, sampling=sampling, cache_salt="a"))
        handed_off = await router.finish(greedy_spec(PROMPT, 5, sampling=sampling, cache_salt="b"), prefill)

    def logprobs(reply):  # type: ignore[no-untyped-def]
        return [entry for update in reply.updates for entry in update.logprobs]

    assert logprobs(handed_off) == logprobs(local)
    assert [len(entry.top_token_ids) for entry in logprobs(local)] == [3] * 5
    assert handed_off.updates[0].prompt_logprobs == local.updates[0].prompt_logprobs
    assert [entry.token_id for entry in local.updates[0].prompt_logprobs] == PROMPT[1:]


async def test_blocks_that_decode_holds_are_not_sent_again() -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        await router.finish(greedy_spec(PROMPT, 4), prefill)
        again = await router.finish(greedy_spec([*PROMPT, 9, 9], 6), prefill)

        block_bytes = decode.engine.engine.kv_layout.block_bytes
        # 47 tokens are 12 blocks; 45 of them and 3 generated ones filled 12 blocks of which 11 agree.
        assert again.timings.transfer_bytes == block_bytes
        assert again.timings.num_hit_tokens == 44
        assert again.token_ids == expected_tokens([*PROMPT, 9, 9], 6)


async def test_tenants_do_not_share_blocks() -> None:
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as router,
    ):
        await router.finish(greedy_spec(PROMPT, 4, cache_salt="tenant-a"), prefill)
        other = await router.finish(greedy_spec(PROMPT, 4, cache_salt="tenant-b"), prefill)

        assert other.timings.num_hit_tokens == 0


async def test_hand_off_waits_for_room_on_the_decode_worker() -> None:
    # 20 blocks of 4 tokens: one request of 45 + 20 tokens at a time.
    async with (
        prefill_worker(build_fake_engine()) as prefill,
        decode_worker(build_fake_engine(num_blocks=20)) as decode,
        router_link(decode) as router,
    ):
        prompts = [[n, *PROMPT[1:]] for n in range(1, 5)]
        replies = await asyncio.gather(*(router.finish(greedy_spec(p, 20), prefill) for p in prompts))

        assert [reply.token_ids for reply in replies] == [expected_tokens(p, 20) for p in prompts]
        assert not any(reply.timings.prefill_fell_back for reply in replies)
        await decode.until_idle()
        await prefill.until_idle()


async def test_many_requests_at_once_on_small_caches_all_finish() -> None:
    async with (
        prefill_worker(build_fake_engine(num_blocks=24, token_budget=32)) as prefill,
        decode_worker(build_fake_engine(num_blocks=40)) as decode,
        router_link(decode) as router,
    ):
        prompts = [PROMPT[: 3 + 2 * n] + [n + 1] for n in range(20)]
        replies = await asyncio.gather(
            *(router.finish(greedy_spec(p, 12), prefill if n % 3 else "") for n, p in enumerate(prompts))
        )

        assert [reply.token_ids for reply in replies] == [expected_tokens(p, 12) for p in prompts]
        await decode.until_idle()
        await prefill.until_idle()


async def test_bad_sequence_is_answered_and_the_link_goes_on() -> None:
    bad_specs = [
        greedy_spec([], 4),
        greedy_spec([1, 2, 9999], 4),
        greedy_spec(list(range(1, 200)) * 2, 4),
        greedy_spec(PROMPT, 0),
        greedy_spec(PROMPT, 4, sampling={"temperature": float("nan")}),
        greedy_spec(PROMPT, 4, sampling={"top_p": 0.0}),
        greedy_spec(PROMPT, 4, sampling={"num_logprobs": 10_000}),
        greedy_spec(PROMPT, 4, output_ids=[1, 2, 3, 4]),
        greedy_spec(PROMPT, 4, sampling={"logit_bias": {9999: 1.0}}),
        greedy_spec([1] * 20_000, 4, sampling={"num_prompt_logprobs": 20}),
    ]
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        replies = [await router.finish(spec) for spec in bad_specs]
        good = await router.finish(greedy_spec(PROMPT, 4))

        kinds = {reply.last.error.kind for reply in replies}
        assert kinds == {common_pb2.ERROR_KIND_INVALID_REQUEST}
        assert good.token_ids == expected_tokens(PROMPT, 4)
        await decode.until_idle()


async def test_full_worker_refuses_with_a_time_to_come_back() -> None:
    async with decode_worker(build_fake_engine(), max_requests=0) as decode, router_link(decode) as router:
        reply = await router.finish(greedy_spec(PROMPT, 4))

        assert reply.last.error.kind == common_pb2.ERROR_KIND_OVERLOADED
        assert reply.last.error.retry_after_s > 0


async def test_draining_worker_finishes_what_runs_and_sends_new_requests_away() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        _, running = await router.submit(greedy_spec(PROMPT, 60))
        await running.has_tokens.wait()
        drain = asyncio.create_task(decode.admission.drain(30.0))
        await asyncio.sleep(0)
        refused = await router.finish(greedy_spec(PROMPT, 4))

        assert refused.last.error.kind == common_pb2.ERROR_KIND_WORKER_LOST
        assert await drain
        await running.ended.wait()
        assert running.token_ids == expected_tokens(PROMPT, 60)


async def test_cancel_right_behind_its_submit_is_answered() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        key, reply = await router.submit(greedy_spec(PROMPT, 100))
        await router.cancel(key)
        await reply.ended.wait()

        assert reply.last.finish_reason == common_pb2.FINISH_REASON_ABORTED
        await decode.until_idle()


async def test_cancel_of_an_unknown_key_changes_nothing() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        await router.cancel(77)
        reply = await router.finish(greedy_spec(PROMPT, 4))

        assert reply.token_ids == expected_tokens(PROMPT, 4)


async def test_key_used_twice_at_once_breaks_the_link() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        spec = greedy_spec(PROMPT, 150)
        for _ in range(2):
            await router.write(LinkRequest(submit=Submit(key=5, sequence=spec)))

        assert await router.code() == grpc.StatusCode.INVALID_ARGUMENT
        await decode.until_idle()


async def test_updates_of_one_step_travel_in_one_message() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        specs = [greedy_spec([n, 2, 3], 40) for n in range(1, 9)]
        await asyncio.gather(*(router.finish(spec) for spec in specs))

        num_tokens = sum(len(u.token_ids) for r in router.responses for u in r.updates)
        assert num_tokens == 8 * 40
        assert len(router.responses) < num_tokens / 4
        assert all(response.load.num_total_blocks == 64 for response in router.responses)


async def test_two_links_do_not_see_each_other() -> None:
    async with (
        decode_worker(build_fake_engine()) as decode,
        router_link(decode) as one,
        router_link(decode) as other,
    ):
        mine, theirs = await asyncio.gather(
            one.finish(greedy_spec(PROMPT, 30)), other.finish(greedy_spec(PROMPT[:9], 30))
        )

        assert mine.token_ids == expected_tokens(PROMPT, 30)
        assert theirs.token_ids == expected_tokens(PROMPT[:9], 30)


async def test_load_is_right_although_no_step_follows_a_cancel() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        key, reply = await router.submit(greedy_spec(PROMPT, 190))
        await reply.has_tokens.wait()
        await router.cancel(key)
        await reply.ended.wait()
        await decode.until_idle()

        load = decode.load.load()
        assert (load.num_running, load.num_waiting, load.num_free_blocks) == (0, 0, 64)


class LastTokens(GatedModel):
    """Notes the last token of each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, batch: ForwardBatch, *args: Any, **wanted: Any) -> Any:
        self.seen.append(int(batch.token_ids_T[-1]))
        return super().forward(batch, *args, **wanted)


@pytest.mark.parametrize("is_handed_off", [False, True])
async def test_requests_that_wait_are_served_by_priority_and_then_by_arrival(is_handed_off: bool) -> None:
    """By the worker that computes the prompt, one at a time. Prompts are told by their last token."""
    prefill_model, decode_model = LastTokens(), LastTokens()
    held = prefill_model if is_handed_off else decode_model
    priorities = {1: 9, 2: 5, 3: 0, 4: -1}
    if not is_handed_off:  # Prefill calls are streams of their own: two may arrive in either order
        priorities[5] = 0
    async with (
        prefill_worker(build_fake_engine(model=prefill_model, max_running=1)) as prefill,
        decode_worker(build_fake_engine(model=decode_model, max_running=1)) as decode,
        router_link(decode) as router,
    ):
        held.hold()
        replies: list[Reply] = []
        for last_token, priority in priorities.items():
            spec = greedy_spec([*PROMPT, last_token], 1, priority=priority)
            replies.append((await router.submit(spec, prefill if is_handed_off else ""))[1])
            if len(replies) == 1:
                await held.until_held()
        worker = prefill if is_handed_off else decode
        while len(worker.engine._sinks) < len(replies):  # each has just been given to the engine thread
            await router.write(LinkRequest())
        held.open()
        async with asyncio.timeout(20):
            await asyncio.gather(*(reply.ended.wait() for reply in replies))
    assert held.seen == ([1, 4, 3, 2] if is_handed_off else [1, 4, 3, 5, 2])
