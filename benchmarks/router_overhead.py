"""What the router costs: CPU microseconds of its process per request and per streamed token.

    python -m benchmarks.router_overhead [--streams 1 8 32 128] [--tokens 256] [--write]

The real router as a process; a decode worker that makes nothing but tokens, one message a step for all its
sequences, as a process; and streaming clients. Requests of one token give the cost of a request; the rest of
a long one, divided by its tokens, the cost of a token. The limit is a bare uvicorn application that streams
the same bytes (benchmarks/bare_stream.py), measured in the same way at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results_file import table, write_result
from kvstore.embedded import EmbeddedServer
from kvstore.registry import RedisRegistry
from kvstore.store import Store
from proto import common_pb2, link_pb2, link_pb2_grpc
from servicekit.descriptors import reserve_descriptors
from servicekit.garbage import exempt_from_garbage_search
from servicekit.rpc import build_server
from tests.fakes.fake_decode_worker import decode_record
from tests.fakes.tiny_tokenizer import write_model_dir

MODEL = "test"
COLUMNS = (
    "streams",
    "requests/s",
    "us/request",
    "bare us/request",
    "tokens/s",
    "us/token",
    "bare us/token",
    "chunks/token",
)


class StepWorker(link_pb2_grpc.LinkServiceServicer):
    """One token a sequence every `step_s`, all of a link in one message."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Link(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        left: dict[int, int] = {}  # key -> tokens still to make
        started = set()
        has_work = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, left, has_work))
        try:
            yield link_pb2.LinkResponse(load=link_pb2.WorkerLoad())
            while True:
                await has_work.wait()
                response = link_pb2.LinkResponse(load=link_pb2.WorkerLoad(num_running=len(left)))
                for key in list(left):
                    left[key] -= 1
                    update = response.updates.add(key=key, token_ids=[70 + left[key] % 100])
                    if key not in started:
                        started.add(key)
                        update.timings.num_hit_tokens = 0
                    if not left[key]:
                        del left[key]
                        started.discard(key)
                        update.finish_reason = common_pb2.FINISH_REASON_LENGTH
                if not left:
                    has_work.clear()
                yield response
                await asyncio.sleep(self._step_s)
        finally:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[Any], left: dict[int, int], has_work: asyncio.Event
    ) -> None:
        async for request in requests:
            if request.HasField("submit"):
                left[request.submit.key] = request.submit.sequence.sampling.max_tokens
                has_work.set()
            else:
                left.pop(request.cancel.key, None)


async def run_worker(redis_url: str, step_s: float) -> None:
    server, port = build_server([], host="127.0.0.1", port=0)
    link_pb2_grpc.add_LinkServiceServicer_to_server(StepWorker(step_s), server)
    await server.start()
    store = Store(redis_url)
    record = decode_record("decode-0", f"127.0.0.1:{port}", max_model_len=4096)
    await RedisRegistry(store, MODEL).announce(record, 3600.0)
    await server.wait_for_termination()


@asynccontextmanager
async def child(*argv: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, *argv, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


class Client:
    """One connection, kept alive; HTTP by hand, so that the client takes little of the two cores."""

    def __init__(self, port: int, prompt: list[int]) -> None:
        self._port = port
        self._prompt = str(prompt)

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)

    async def stream(self, num_tokens: int) -> int:
        """Number of chunks with text."""
        body = (
            f'{{"model":"{MODEL}","prompt":{self._prompt},"max_tokens":{num_tokens},"stream":true,'
            '"ignore_eos":true,"temperature":0}'
        )
        head = f"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write((head + body).encode())
        raw = await self._reader.readuntil(b"0\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 200"), raw[:500]
        assert b"[DONE]" in raw
        return raw.count(b"data: {")


async def wait_until_ready(port: int) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n")
            is_ready = b" 200 " in await reader.read(64)
            writer.close()
            if is_ready:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)  # a process can only be asked


async def measure(
    router: psutil.Process, clients: list[Client], num_tokens: int, num_rounds: int
) -> tuple[float, float, int]:
    """CPU seconds of the router, wall seconds, chunks: each client streams num_rounds times."""

    async def visit(client: Client) -> int:
        return sum([await client.stream(num_tokens) for _ in range(num_rounds)])

    before, started_at = router.cpu_times(), time.monotonic()
    chunks = await asyncio.gather(*(visit(client) for client in clients))
    after = router.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return cpu_s, time.monotonic() - started_at, sum(chunks)


async def bench_streams(
    router: psutil.Process, port: int, num_streams: int, options: argparse.Namespace
) -> dict[str, float]:
    clients = [Client(port, [70 + i % 100 for i in range(options.prompt_len)]) for _ in range(num_streams)]
    for client in clients:
        await client.connect()
    await measure(router, clients, 8, 3)  # warm
    num_rounds = max(4, 512 // num_streams)
    request_cpu_s, request_wall_s, _ = await measure(router, clients, 1, num_rounds)
    num_requests = num_rounds * num_streams
    request_us = request_cpu_s / num_requests * 1e6
    token_rounds = max(1, 16 // num_streams)
    cpu_s, wall_s, chunks = await measure(router, clients, options.tokens, token_rounds)
    num_streamed = token_rounds * num_streams
    num_tokens = num_streamed * (options.tokens - 1)
    return {
        "streams": num_streams,
        "requests/s": num_requests / request_wall_s,
        "us/request": request_us,
        "tokens/s": num_streamed * options.tokens / wall_s,
        "us/token": (cpu_s * 1e6 - request_us * num_streamed) / num_tokens,
        "chunks/token": chunks / (num_streamed * options.tokens),
    }


@asynccontextmanager
async def running_routers(
    options: argparse.Namespace, ports: Sequence[int], step_ms: float
) -> AsyncIterator[list[psutil.Process]]:
    """Router processes over one worker that only makes tokens, ready."""
    server = EmbeddedServer()
    redis_url = server.start()
    async with AsyncExitStack() as stack:
        stack.callback(server.stop)
        model_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model_dir(model_dir)
        config = (model_dir / "config.json").read_text().replace("512", "4096")
        (model_dir / "config.json").write_text(config)
        worker = ("-m", "benchmarks.router_overhead", "--worker", redis_url, "--step-ms", str(step_ms))
        await stack.enter_async_context(child(*worker))
        routers = []
        for port in ports:
            settings = {
                "MODEL": str(model_dir),
                "SERVED_MODEL_NAME": MODEL,
                "PORT": str(port),
                "REDIS_URL": redis_url,
                "LOG_LEVEL": "WARNING",
                "LOG_FORMAT": "json",
            }
            environment = {f"BATON_ROUTER_{name}": value for name, value in settings.items()}
            process = await stack.enter_async_context(child("-m", "router", **environment))
            await wait_until_ready(port)
            routers.append(psutil.Process(process.pid))
        yield routers


@asynccontextmanager
async def running_bare(port: int, step_ms: float) -> AsyncIterator[psutil.Process]:
    async with child("-m", "benchmarks.bare_stream", str(port), str(step_ms)) as process:
        await wait_until_ready(port)
        yield psutil.Process(process.pid)


async def run(options: argparse.Namespace) -> None:
    rows = []
    async with (
        running_routers(options, [options.port], options.step_ms) as [router],
        running_bare(options.port + 1, options.step_ms) as bare,
    ):
        for num_streams in options.streams:
            row = await bench_streams(router, options.port, num_streams, options)
            limit = await bench_streams(bare, options.port + 1, num_streams, options)
            rows.append(row | {f"bare {name}": limit[name] for name in ("us/request", "us/token")})
    print(*table(COLUMNS, rows), sep="\n")
    if options.write:
        notes = [
            "CPU time of the process (user and system), not waiting",
            "bare: a uvicorn application that streams the same bytes",
            f"prompts of {options.prompt_len} tokens; {options.tokens} out, one in {options.step_ms} ms",
        ]
        print(write_result("router-overhead", "What the router costs", COLUMNS, rows, notes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=256, help="of each long stream")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=5.0, help="of the worker that only makes tokens")
    parser.add_argument("--port", type=int, default=18432)
    parser.add_argument("--write", action="store_true", help="JSON into benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    reserve_descriptors()
    exempt_from_garbage_search()  # pauses of worker and client are not the router's
    if options.worker:
        asyncio.run(run_worker(options.worker, options.step_ms / 1000))
    else:
        asyncio.run(run(options))


if __name__ == "__main__":
    main()
