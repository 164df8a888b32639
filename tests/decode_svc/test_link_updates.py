"""What waits to go up a link comes in order, in as few messages as it may."""

from __future__ import annotations

import asyncio

from decode_svc.link_updates import MAX_UPDATE_BYTES, LinkUpdates
from proto import common_pb2
from proto.link_pb2 import SequenceUpdate


def _prompt_logprobs(num_bytes: int) -> list[common_pb2.TokenLogprobs]:
    entry = common_pb2.TokenLogprobs(token_id=1, logprob=-1.0, top_logprobs=[0.5] * 100)
    return [entry] * (num_bytes // entry.ByteSize())


async def test_all_of_a_step_is_one_message_in_order() -> None:
    updates = LinkUpdates()
    updates.add_tokens(7, (102_399, 5))
    updates.add(SequenceUpdate(key=3, token_ids=[1], finish_reason=common_pb2.FINISH_REASON_STOP))
    updates.add_tokens(2**63, (0,))
    [message] = await updates.take()
    assert [(update.key, list(update.token_ids)) for update in message.updates] == [
        (7, [102_399, 5]),
        (3, [1]),
        (2**63, [0]),
    ]
    assert message.updates[1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert updates.num_tokens == 4


async def test_the_next_step_is_another_message_and_wakes_who_waits() -> None:
    updates = LinkUpdates()
    updates.add_tokens(1, (1,))
    await updates.take()
    taking = asyncio.create_task(updates.take())
    await asyncio.sleep(0)
    assert not taking.done()
    updates.add_tokens(1, (2,))
    [message] = await taking
    assert [list(update.token_ids) for update in message.updates] == [[2]]


async def test_more_than_a_message_may_hold_goes_into_several() -> None:
    updates = LinkUpdates()
    for key in range(5):
        updates.add(SequenceUpdate(key=key, prompt_logprobs=_prompt_logprobs(MAX_UPDATE_BYTES // 3)))
    updates.add(SequenceUpdate(key=5, prompt_logprobs=_prompt_logprobs(2 * MAX_UPDATE_BYTES)))
    for key in range(6, 60_006):
        updates.add_tokens(key, (102_399,))
    messages = await updates.take()
    assert [update.key for message in messages for update in message.updates] == list(range(60_006))
    assert all(m.ByteSize() <= 1.01 * MAX_UPDATE_BYTES or len(m.updates) == 1 for m in messages)
    assert len(messages) < 10
