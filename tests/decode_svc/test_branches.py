"""Branches of one prompt: it is computed once, and each branch is as if it were alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from decode_svc.branches import BranchGroups
from engine.outputs import StepOutput
from proto import common_pb2
from proto.common_pb2 import SequenceSpec
from tests.fakes.fake_model import build_fake_engine
from tests.fakes.fake_workers import (
    FakeRouter,
    FakeWorker,
    GatedModel,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(46)]  # of blocks of 4
TAIL = 2  # tokens of the last block
NUM_BRANCHES = 4
MAX_TOKENS = 12


def branch_spec(seed: int, max_tokens: int = MAX_TOKENS, output_ids: list[int] | None = None) -> SequenceSpec:
    sampling = {"temperature": 1.0, "seed": seed}
    return greedy_spec(PROMPT, max_tokens, sampling=sampling, output_ids=output_ids or [])


@dataclass
class Stack:
    prefill: FakeWorker
    prefill_model: GatedModel
    decode: FakeWorker
    decode_model: GatedModel
    router: FakeRouter
    num_prefilled: dict[str, int]  # tokens computed, by worker; on decode without those of decodes

    async def submit(
        self, specs: list[SequenceSpec], prefill: FakeWorker | str, group: int = 7
    ) -> list[tuple[int, Reply]]:
        return [await self.router.submit(spec, prefill, branch_group=group) for spec in specs]

    async def finish(self, specs: list[SequenceSpec], prefill: FakeWorker | str) -> list[Reply]:
        """All have come before the first one can end."""
        self.prefill_model.hold()
        self.decode_model.hold()
        replies = [reply for _, reply in await self.submit(specs, prefill)]
        refused = await self.router.finish(greedy_spec([1], 0))  # a link is read in order
        assert refused.last.HasField("error")
        self.prefill_model.open()
        self.decode_model.open()
        await until_ended(replies)
        await self.until_idle()
        return replies

    async def until_idle(self) -> None:
        await self.decode.until_idle()
        await self.prefill.until_idle()


async def until_ended(replies: list[Reply]) -> None:
    async with asyncio.timeout(20):
        for reply in replies:
            await reply.ended.wait()


@asynccontextmanager
async def branch_stack() -> AsyncIterator[Stack]:
    prefill_model, decode_model = GatedModel(), GatedModel()
    counts = {"prefill": 0, "decode": 0}
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(prefill_worker(build_fake_engine(model=prefill_model)))
        decode = await stack.enter_async_context(decode_worker(build_fake_engine(model=decode_model)))
        router = await stack.enter_async_context(router_link(decode))
        for name, worker in (("prefill", prefill), ("decode", decode)):

            def count(step: StepOutput, name: str = name) -> None:
                counts[name] += step.stats.num_prefill_tokens

            worker.engine.subscribe(count)
        try:
            yield Stack(prefill, prefill_model, decode, decode_model, router, counts)
        finally:
            prefill_model.open()
            decode_model.open()


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with branch_stack() as stack:
        yield stack


async def tokens_alone(spec: SequenceSpec) -> list[int]:
    async with branch_stack() as stack:
        return (await stack.router.finish(spec)).token_ids


SEEDS = list(range(1, NUM_BRANCHES + 1))


async def test_branches_of_a_hand_off_share_one_prefill_and_one_transfer(stack: Stack) -> None:
    replies = await stack.finish([branch_spec(seed) for seed in SEEDS], stack.prefill)
    assert stack.num_prefilled == {"prefill": len(PROMPT), "decode": (NUM_BRANCHES - 1) * TAIL}
    assert stack.decode.metric("baton_handoffs_total", state="COMMITTED") == 1
    hits = [reply.timings.num_hit_tokens for reply in replies]
    assert hits == [0] + [len(PROMPT) - TAIL] * (NUM_BRANCHES - 1)
    alone = [await tokens_alone(branch_spec(seed)) for seed in SEEDS]
    assert [reply.token_ids for reply in replies] == alone
    assert len({tuple(token_ids) for token_ids in alone}) == NUM_BRANCHES


async def test_branches_prefilled_by_decode_share_the_prefill(stack: Stack) -> None:
    replies = await stack.finish([branch_spec(seed) for seed in SEEDS], "")
    assert stack.num_prefilled == {"prefill": 0, "decode": len(PROMPT) + (NUM_BRANCHES - 1) * TAIL}
    assert [reply.token_ids for reply in replies] == [await tokens_alone(branch_spec(s)) for s in SEEDS]


async def test_branches_of_one_token_stay_on_the_prefill_worker(stack: Stack) -> None:
    replies = await stack.finish([branch_spec(seed, max_tokens=1) for seed in SEEDS], stack.prefill)
    assert stack.num_prefilled == {"prefill": len(PROMPT) + (NUM_BRANCHES - 1) * TAIL, "decode": 0}
    assert stack.decode.metric("baton_handoff_bytes_total", carrier="stream") == 0
    alone = [await tokens_alone(branch_spec(seed, max_tokens=1)) for seed in SEEDS]
    assert [reply.token_ids for reply in replies] == alone


async def test_a_dead_prefill_worker_costs_one_local_prefill(stack: Stack) -> None:
    replies = await stack.finish([branch_spec(seed) for seed in SEEDS], "127.0.0.1:1")
    assert stack.num_prefilled["decode"] == len(PROMPT) + (NUM_BRANCHES - 1) * TAIL
    assert [reply.timings.prefill_fell_back for reply in replies] == [True, False, False, False]
    assert [reply.token_ids for reply in replies] == [await tokens_alone(branch_spec(s)) for s in SEEDS]


@pytest.mark.parametrize("cancelled", [{0}, {1}, {0, 1, 2}, {0, 1, 2, 3}])
async def test_cancelled_branches_leave_the_others_alone(stack: Stack, cancelled: set[int]) -> None:
    stack.prefill_model.hold()
    submitted = await stack.submit([branch_spec(seed) for seed in SEEDS], stack.prefill)
    await stack.prefill_model.until_held()
    for index in cancelled:
        await stack.router.cancel(submitted[index][0])
    await until_ended([submitted[index][1] for index in cancelled])
    stack.prefill_model.open()
    await until_ended([reply for _, reply in submitted])
    await stack.until_idle()
    for index, (_, reply) in enumerate(submitted):
        if index in cancelled:
            assert reply.last.finish_reason == common_pb2.FINISH_REASON_ABORTED
        else:
            assert reply.token_ids == await tokens_alone(branch_spec(SEEDS[index]))


async def test_a_branch_cancelled_while_it_decodes_leaves_the_shared_blocks_to_the_others(
    stack: Stack,
) -> None:
    stack.decode_model.hold(num_passes_before=3)
    submitted = await stack.submit([branch_spec(seed, 40) for seed in SEEDS], stack.prefill)
    await stack.decode_model.until_held()
    await stack.router.cancel(submitted[0][0])
    await stack.router.cancel(submitted[2][0])
    stack.decode_model.open()
    await until_ended([reply for _, reply in submitted])
    await stack.until_idle()
    for index in (1, 3):
        assert submitted[index][1].token_ids == await tokens_alone(branch_spec(SEEDS[index], 40))


async def test_a_lost_link_ends_all_branches(stack: Stack) -> None:
    stack.prefill_model.hold()
    await stack.submit([branch_spec(seed) for seed in SEEDS], stack.prefill)
    await stack.prefill_model.until_held()
    stack.router.cut()
    stack.prefill_model.open()
    await stack.until_idle()


@pytest.mark.parametrize("has_prefill", [True, False])
async def test_branches_that_move_here_go_on_with_their_own_outputs(stack: Stack, has_prefill: bool) -> None:
    alone = [await tokens_alone(branch_spec(seed)) for seed in SEEDS]
    specs = [
        branch_spec(seed, output_ids=alone[i][: 3 * i]) for i, seed in enumerate(SEEDS)
    ]  # the first has none yet
    replies = await stack.finish(specs, stack.prefill if has_prefill else "")
    assert [alone[i][: 3 * i] + reply.token_ids for i, reply in enumerate(replies)] == alone
    # The prompt's full blocks once; of each branch what is its own.
    own = sum(TAIL + 3 * i for i in range(1, NUM_BRANCHES))
    assert sum(stack.num_prefilled.values()) == len(PROMPT) + own


async def test_an_impossible_branch_is_refused_and_the_next_one_computes_the_prompt(stack: Stack) -> None:
    bad = branch_spec(1)
    bad.sampling.top_p = 7.0
    replies = await stack.finish([bad, *(branch_spec(seed) for seed in SEEDS[1:])], stack.prefill)
    assert replies[0].last.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST
    assert stack.num_prefilled == {"prefill": len(PROMPT), "decode": (NUM_BRANCHES - 2) * TAIL}


@pytest.mark.parametrize("has_prefill", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_prompt_logprobs_are_computed_once_and_every_branch_has_them(
    stack: Stack, has_prefill: bool, max_tokens: int
) -> None:
    specs = [branch_spec(seed, max_tokens) for seed in SEEDS]
    for spec in specs:
        spec.sampling.num_prompt_logprobs = 1
        spec.sampling.num_logprobs = 1
    replies = await stack.finish(specs, stack.prefill if has_prefill else "")
    assert sum(stack.num_prefilled.values()) == len(PROMPT) + (NUM_BRANCHES - 1) * TAIL
    of_each = [list(reply.updates[0].prompt_logprobs) for reply in replies]
    assert len(of_each[0]) == len(PROMPT) - 1
    assert all(entries == of_each[0] for entries in of_each)
    assert [entry.token_id for entry in of_each[0]] == PROMPT[1:]


async def test_other_prompt_logprobs_than_those_of_the_group_are_computed(stack: Stack) -> None:
    specs = [branch_spec(seed, 2) for seed in SEEDS[:2]]
    specs[0].sampling.num_prompt_logprobs = 0
    specs[1].sampling.num_prompt_logprobs = 2
    replies = await stack.finish(specs, "")
    assert [len(reply.updates[0].prompt_logprobs[0].top_token_ids) for reply in replies] == [0, 2]


async def test_groups_do_not_outlive_their_branches() -> None:
    groups = BranchGroups()
    first = groups.join(5)
    assert groups.join(5) is first
    assert groups.join(0) is not groups.join(0)
    groups.leave(5)
    assert groups.join(5) is first
    groups.leave(5)
    groups.leave(5)
    assert groups.join(5) is not first
