import asyncio
import contextlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load import (
    Target,
    brings_token,
    closed_loop,
    closed_sessions,
    measure,
    open_loop,
    open_sessions,
    served_model,
)
from baton.bench.workload import Session, Turn
from baton.http_client import EventParser, HttpClient, HttpStatusError, NoAnswer


@contextlib.asynccontextmanager
async def server(answer):
    """`answer(path, body, writer)` writes a whole HTTP response; the connection is kept."""

    handlers = set()

    async def serve(reader, writer):
        handlers.add(asyncio.current_task())
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while not writer.is_closing():
                    path, body = await read_request(reader)
                    await answer(path, body, writer)
                    await writer.drain()
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


async def read_request(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lengths = [line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
    return head.split()[1], await reader.readexactly(int(lengths[0]) if lengths else 0)


def json_response(status, document):
    body = orjson.dumps(document)
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def events_response(documents):
    parts = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"]
    for data in [*map(orjson.dumps, documents), b"[DONE]"]:
        event = b"data: " + data + b"\n\n"
        parts.append(b"%x\r\n%s\r\n" % (len(event), event))
    return b"".join([*parts, b"0\r\n\r\n"])


def chunk(text, finish_reason=None):
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}}


@given(st.lists(st.binary(max_size=30).map(bytes.hex), max_size=8), st.data())
def test_events_are_the_same_however_the_bytes_are_split(texts, data):
    stream = b"".join(f": comment\r\ndata: {text}\r\n\r\n".encode() for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parser = EventParser()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[start:end])
    assert found == [text.encode() for text in texts]


async def test_a_stream_is_measured_with_the_tokens_of_its_usage():
    async def answer(path, body, writer):
        writer.write(events_response([chunk("a"), chunk(""), chunk("b"), chunk("", "length"), USAGE]))

    async with server(answer) as url, HttpClient(url) as client:
        measured = await measure(client, Target(url=url, model="m", output_len=5), [1, 2, 3])
    assert measured.error is None
    assert len(measured.chunk_times) == 3
    assert (measured.num_output_tokens, measured.num_hit_tokens, measured.num_prompt_tokens) == (5, 16, 3)


async def test_without_usage_the_chunks_are_counted():
    async def answer(path, body, writer):
        writer.write(events_response([chunk("a"), chunk("b", "stop")]))

    async with server(answer) as url, HttpClient(url) as client:
        measured = await measure(client, Target(url=url, model="m", output_len=5), [1])
    assert measured.num_output_tokens == 2


async def test_closed_loop_keeps_its_concurrency_and_sends_every_prompt_once():
    running, most, seen = 0, 0, []
    gate = asyncio.Event()

    async def answer(path, body, writer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            gate.set()  # the third one can only be here while two others wait
        await gate.wait()
        running -= 1
        seen.append(orjson.loads(body)["prompt"])
        writer.write(events_response([chunk("a", "length")]))

    prompts = [[i] for i in range(9)]
    async with server(answer) as url:
        measured = await closed_loop(Target(url=url, model="m", output_len=1), prompts, concurrency=3)
    assert sorted(seen) == prompts
    assert most == 3
    assert len(measured) == 9


async def test_open_loop_sends_while_earlier_requests_still_run():
    arrived = 0
    all_here = asyncio.Event()

    async def answer(path, body, writer):
        nonlocal arrived
        arrived += 1
        if arrived == 4:
            all_here.set()
        await all_here.wait()
        writer.write(events_response([chunk("a", "length")]))

    async with server(answer) as url:
        measured = await open_loop(
            Target(url=url, model="m", output_len=1), [[1]] * 4, [0.0, 0.0, 0.01, 0.02]
        )
    assert [m.error for m in measured] == [None] * 4


async def test_a_refusal_is_recorded_with_the_servers_own_words():
    async def answer(path, body, writer):
        writer.write(json_response(429, {"error": {"message": "too many requests", "type": "x"}}))

    async with server(answer) as url, HttpClient(url) as client:
        measured = await measure(client, Target(url=url, model="m", output_len=1), [1])
    assert measured.error == "HTTP 429: too many requests"
    assert not measured.is_ok


async def test_a_connection_cut_mid_answer_is_recorded():
    async def answer(path, body, writer):
        writer.write(events_response([chunk("a")])[:-20])
        await writer.drain()
        writer.close()

    async with server(answer) as url, HttpClient(url) as client:
        measured = await measure(client, Target(url=url, model="m", output_len=1), [1])
    assert "connection ended before the answer did" in measured.error


async def test_an_error_event_inside_a_stream_is_recorded():
    async def answer(path, body, writer):
        writer.write(events_response([chunk("a"), {"error": {"message": "worker lost"}}]))

    async with server(answer) as url, HttpClient(url) as client:
        measured = await measure(client, Target(url=url, model="m", output_len=1), [1])
    assert measured.error == "worker lost"


async def test_an_answer_that_takes_too_long_ends_with_its_connection():
    async def answer(path, body, writer):
        await asyncio.Event().wait()

    async with server(answer) as url, HttpClient(url) as client:
        with pytest.raises(NoAnswer, match="no end of the answer"):
            await client.get("/x", timeout_s=0.05)


async def test_a_connection_is_used_again_after_a_complete_answer():
    peers = set()

    async def answer(path, body, writer):
        peers.add(writer.get_extra_info("peername"))
        writer.write(json_response(200, {"data": [{"id": "m"}]}))

    async with server(answer) as url, HttpClient(url) as client:
        await client.get("/v1/models")
        await client.get("/v1/models")
        assert await served_model(url) == "m"
    assert len(peers) == 2  # one for both gets, one for served_model


async def test_nobody_listening_is_one_clear_line():
    async with HttpClient("http://127.0.0.1:1") as client:
        with pytest.raises(NoAnswer, match="no server at 127.0.0.1:1"):
            await client.get("/ready")


async def test_an_html_error_page_is_not_hidden():
    async def answer(path, body, writer):
        writer.write(b"HTTP/1.1 502 X\r\nContent-Length: 14\r\n\r\n<h1>Hello</h1>")

    async with server(answer) as url, HttpClient(url) as client:
        with pytest.raises(HttpStatusError, match="HTTP 502: <h1>Hello</h1>"):
            await client.get_json("/v1/models")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_a_wrong_url_is_refused(url):
    with pytest.raises(ValueError, match="not a URL"):
        HttpClient(url)


def test_a_role_chunk_without_choices_or_text_brings_no_token():
    assert not brings_token({"choices": []})
    assert not brings_token({"usage": {}})
    assert not brings_token(chunk("", "stop"))
    assert brings_token(chunk("x", "stop"))


def recording_server(prompts, answers):
    """Answers each prompt with the next ids and keeps what was asked."""

    async def answer(path, body, writer):
        request = orjson.loads(body)
        prompts.append((request["prompt"], request["max_tokens"], request.get("return_token_ids")))
        ids = next(answers)
        if ids is None:
            writer.write(json_response(503, {"error": {"message": "full"}}))
        else:
            events = [chunk("x") for _ in ids]
            for event, token_id in zip(events, ids, strict=True):
                event["choices"][0]["token_ids"] = [token_id]
            writer.write(events_response([*events, chunk("", "length")]))

    return server(answer)


def conversation(*new_ids):
    return Session(turns=tuple(Turn(new_ids=ids, output_len=len(ids)) for ids in new_ids), class_name="chat")


async def test_the_answers_of_a_session_are_part_of_its_next_prompts():
    prompts = []
    async with recording_server(prompts, iter([[7], [8, 9], [5]])) as url:
        session = conversation((1,), (2, 3), (4,))
        measurements = await closed_sessions(Target(url=url, model="m"), [session], concurrency=3)
    assert prompts == [([1], 1, True), ([1, 7, 2, 3], 2, True), ([1, 7, 2, 3, 8, 9, 4], 1, True)]
    assert [m.num_prompt_tokens for m in measurements] == [1, 4, 7]
    assert {m.class_name for m in measurements} == {"chat"}


async def test_a_session_ends_with_the_request_that_failed():
    prompts = []
    async with recording_server(prompts, iter([[7], None, [5]])) as url:
        session = conversation((1,), (2,), (3,))
        measurements = await open_sessions(Target(url=url, model="m"), [session], [0.0])
    assert len(prompts) == 2
    assert [m.is_ok for m in measurements] == [True, False]


async def test_single_requests_ask_for_no_ids():
    prompts = []
    async with recording_server(prompts, iter([[7]])) as url:
        await closed_sessions(Target(url=url, model="m"), [conversation((1, 2))], concurrency=1)
    assert prompts == [([1, 2], 2, None)]
