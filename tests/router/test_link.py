from __future__ import annotations

import asyncio

import pytest

from kvstore.store import Backoff
from proto import common_pb2, link_pb2
from router.link import Link
from servicekit.errors import WorkerLost
from tests.fakes.fake_decode_worker import FakeDecodeWorker, decode_record, mixing_script


class Changes:
    """Lets a test wait for a link to come up or go."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until_up(self, link: Link, is_up: bool) -> None:
        while link.is_up is not is_up:
            await self._event.wait()


def submit(max_tokens: int = 5) -> link_pb2.Submit:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return link_pb2.Submit(sequence=common_pb2.SequenceSpec(prompt_ids=[5, 6], sampling=sampling))


async def linked(worker: FakeDecodeWorker) -> tuple[Link, Changes]:
    changes = Changes()
    link = Link(decode_record("decode-0", await worker.start()), changes.notify)
    link.start()
    await changes.until_up(link, True)
    return link, changes


async def test_a_reader_that_comes_late_gets_every_update_in_order_at_once() -> None:
    worker = FakeDecodeWorker(mixing_script(300))
    link, _ = await linked(worker)
    first, second = link.submit(submit()), link.submit(submit())
    updates = []
    while not updates or not updates[-1].finish_reason:
        updates += await second.next()
    late = await first.next()
    assert [list(update.token_ids) for update in late] == [list(update.token_ids) for update in updates]
    assert link.num_streams == 0
    await link.close()
    await worker.kill()


async def test_what_came_before_the_loss_is_read_before_the_error() -> None:
    worker = FakeDecodeWorker(mixing_script(300), hold_after=2)
    link, changes = await linked(worker)
    stream = link.submit(submit())
    await worker.until(lambda: worker.num_emitted == 2)
    later = link.submit(submit())
    await later.next()  # a link keeps the order, so the first stream's updates have come too
    await worker.kill()
    await changes.until_up(link, False)
    assert sum(len(update.token_ids) for update in await stream.next()) == 2
    with pytest.raises(WorkerLost):
        await stream.next()
    with pytest.raises(WorkerLost):
        link.submit(submit())
    await link.close()


async def test_a_finished_request_is_not_cancelled_and_a_cancel_is_sent_once() -> None:
    worker = FakeDecodeWorker(mixing_script(300))
    link, _ = await linked(worker)
    finished = link.submit(submit(max_tokens=1))
    await finished.next()
    finished.close()
    worker.is_held = True
    open_stream = link.submit(submit())
    await worker.until(lambda: len(worker.submits) == 2)
    open_stream.close()
    open_stream.close()
    await worker.until(lambda: not worker.active)
    assert worker.cancelled == [2]
    await link.close()
    await worker.kill()


async def test_load_counts_what_was_submitted_since_the_worker_told() -> None:
    worker = FakeDecodeWorker(mixing_script(300), is_held=True)
    link, _ = await linked(worker)
    streams = [link.submit(submit()) for _ in range(3)]
    assert link.load is not None
    assert link.load.num_running == 0
    assert link.own.requests(link.load.num_running) == 3
    await worker.until(lambda: len(worker.submits) == 3)
    await worker.release()
    await streams[0].next()
    assert link.load.num_running > 0
    assert link.own.requests(link.load.num_running) == link.num_streams  # none counts twice
    await link.close()
    await worker.kill()


async def test_closing_ends_a_link_whose_call_swallows_the_cancellation() -> None:
    class Swallowing(Link):
        """As grpc.aio does when a cancellation meets a refused connection."""

        async def _connect_and_read(self, backoff: Backoff) -> None:
            try:
                entered.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise TimeoutError from None

    entered = asyncio.Event()
    link = Swallowing(decode_record("decode-0", "127.0.0.1:1"), lambda: None)
    link.start()
    await entered.wait()
    async with asyncio.timeout(5):
        await link.close()
