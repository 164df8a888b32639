"""Most tokens go from the link to the connection without waking the task of their request."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from typing import Any

import pytest

from proto import link_pb2
from router.http_protocol import StreamWriter
from router.link import LinkStream
from router.text_format import TextFormat
from tests.fakes.fake_decode_worker import FakeDecodeWorker, mixing_script
from tests.router.conftest import Router, RouterFactory

NUM_TOKENS = 50
PROMPT = [5, 6, 7]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written past ASGI."""
    written: list[bytes] = []
    write = StreamWriter.write

    def noted(writer: StreamWriter, piece: bytes) -> None:
        written.append(piece)
        write(writer, piece)

    monkeypatch.setattr(StreamWriter, "write", noted)
    return written


def expected_ids(num_tokens: int) -> list[int]:
    script, output = mixing_script(300), []
    for _ in range(num_tokens):
        output.append(script(PROMPT, output))
    return output


async def choices_of(router: Router, **fields: Any) -> list[list[int]]:
    """Token ids of each choice of a streamed completion, as they came."""
    options = {"stream": True, "return_token_ids": True, "ignore_eos": True, "max_tokens": NUM_TOKENS}
    response = await router.complete(prompt=PROMPT, **options, **fields)
    return _choices_in(response.text, fields.get("n", 1))


def _choices_in(text: str, n: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(n)]
    for line in text.splitlines():
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else []:
            found[choice["index"]] += choice["token_ids"]
    return found


@pytest.mark.parametrize("n", [1, 3])
async def test_all_but_the_ends_of_a_stream_take_the_short_way(
    router: Router, worker: FakeDecodeWorker, pieces: list[bytes], n: int
) -> None:
    worker.step_s = 0.002
    assert await choices_of(router, n=n) == [expected_ids(NUM_TOKENS)] * n
    assert len(pieces) > n * NUM_TOKENS // 2


async def test_a_stream_that_a_string_may_stop_stays_with_its_task(
    router: Router, worker: FakeDecodeWorker, pieces: list[bytes]
) -> None:
    worker.step_s = 0.002
    assert await choices_of(router, stop=["never"]) == [expected_ids(NUM_TOKENS)]
    assert not pieces


async def test_it_goes_on_after_a_migration(make_router: RouterFactory, pieces: list[bytes]) -> None:
    router = await make_router(policy="round_robin")
    first = await router.add_worker("decode-0", step_s=0.002, hold_after=20)
    second = await router.add_worker("decode-1", step_s=0.002)
    answer = asyncio.create_task(choices_of(router))
    await first.until(lambda: first.num_emitted == 20)
    await first.kill()
    assert await answer == [expected_ids(NUM_TOKENS)]
    assert len(second.submits) == 1
    assert len(pieces) > NUM_TOKENS - 20


@pytest.mark.parametrize("n", [1, 2])
async def test_what_cannot_be_written_at_once_waits_and_keeps_its_place(
    router: Router, worker: FakeDecodeWorker, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    is_ready = itertools.cycle([True, True, False])
    monkeypatch.setattr(StreamWriter, "is_ready", property(lambda writer: next(is_ready)))
    worker.step_s = 0.002
    assert await choices_of(router, n=n) == [expected_ids(NUM_TOKENS)] * n
    assert 0 < len(pieces) < n * NUM_TOKENS * 3 // 4


async def test_a_bug_in_one_stream_breaks_only_that_one(
    router: Router, worker: FakeDecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, num_chunks = TextFormat.chunk, 0

    def failing(self: TextFormat, choice: Any, delta: Any, choices: Any) -> bytes:
        nonlocal num_chunks
        num_chunks += 1
        if num_chunks == 5:
            raise RuntimeError("told by the test")
        return chunk(self, choice, delta, choices)

    monkeypatch.setattr(TextFormat, "chunk", failing)
    worker.step_s = 0.002
    with pytest.raises(Exception, match="peer closed"):
        await choices_of(router)
    assert worker.num_links_broken == 0
    assert await choices_of(router) == [expected_ids(NUM_TOKENS)]
    await worker.until(lambda: not worker.active)


async def test_an_update_is_offered_only_to_one_who_waits_and_never_the_last() -> None:
    offered: list[int] = []
    stream = LinkStream(link=None, key=1)  # type: ignore[arg-type]

    def taker(update: link_pb2.SequenceUpdate) -> bool:
        offered.append(update.token_ids[0])
        return update.token_ids[0] != 3

    stream.taker = taker
    stream.push(link_pb2.SequenceUpdate(token_ids=[1]), is_last=False)
    assert [list(update.token_ids) for update in await stream.next()] == [[1]]
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    for token_id in (2, 3, 4):  # 3 is refused, so 4 has to wait behind it
        stream.push(link_pb2.SequenceUpdate(token_ids=[token_id]), is_last=False)
    assert [list(update.token_ids) for update in await reading] == [[3], [4]]
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    stream.push(link_pb2.SequenceUpdate(token_ids=[5]), is_last=True)
    assert [list(update.token_ids) for update in await reading] == [[5]]
    assert offered == [2, 3]


def _long_lists_of_ints(num: int) -> list[list[int]]:
    lists = [each for each in gc.get_objects() if type(each) is list and len(each) >= num]
    return [each for each in lists if all(type(item) is int for item in each)]


@pytest.mark.parametrize("is_text", [False, True])
async def test_a_prompt_under_way_is_nothing_to_visit_for_the_garbage_search(
    router: Router, worker: FakeDecodeWorker, is_text: bool
) -> None:
    """A list of its ids would be, object by object, for as long as it is young."""
    worker.is_held = True
    num_ids = 400
    prompt = "hello " * num_ids if is_text else [5] * num_ids
    body = json.dumps({"prompt": prompt, "max_tokens": 2, "n": 2, "stream": True})
    del prompt
    before = _long_lists_of_ints(num_ids)
    request = asyncio.create_task(router.client.post("/v1/completions", content=body))
    await worker.until(lambda: len(worker.submits) == 2)
    found = [each for each in _long_lists_of_ints(num_ids) if all(each is not other for other in before)]
    await worker.release()
    assert (await request).status_code == 200
    assert len(worker.submits[0].sequence.prompt_ids) >= num_ids
    assert not found


async def test_a_request_leaves_no_cycles_for_the_garbage_search(router: Router) -> None:
    await router.complete(stream=True)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            await choices_of(router)
            await router.chat(stream=True, n=2)
            await router.complete()
        await router.app.state.serving.drain.wait_idle(5.0)
        await asyncio.sleep(0)
        gc.collect()
        found = {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("router")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found
