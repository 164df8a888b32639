"""What a decode worker costs beside its device: CPU microseconds by thread, of a step, a token and a request.

    python -m benchmarks.worker_overhead [--streams 1 32 256] [--prompts 512 4096] [--step-ms 20] [--write]

The real worker (engine, scheduler, link service, metrics, registry and block index on a Redis server of its
own) around a model that sleeps outside the interpreter and makes one token; a client as a process, which
reads the link as a router does. Threads: the event loop, the engine's (on a CPU: the tensors of a step are
made there too), and all others, which are gRPC's. A token's cost is that of the steps in which all streams
decode and none begins or ends.

late      how long the engine thread waits for the interpreter when its device is done, p50 / p99
messages  of the link, a step
request   one at a time, one token: its cost by thread, and the time until the answer beside the device's
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from baton.bench.measurement import percentile
from baton.ports import free_port
from benchmarks.results_file import table, write_result
from decode_svc.build import build_service
from decode_svc.settings import DecodeSettings
from engine.engine import Engine, EngineLimits
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models.causal_lm import LayerDone
from engine.runner import Runner
from engine.sampler import Sampler
from engine.scheduler import SchedulerConfig
from kvstore.embedded import EmbeddedServer
from kvstore.store import Store
from proto import common_pb2, link_pb2
from servicekit.logging import configure_logging
from servicekit.rpc import build_channel
from servicekit.tracing import NO_TRACER
from worker.worker_process import WorkerProcess

STEP_COLUMNS = (
    "streams",
    "tokens/s",
    "of the device's",
    "loop us/token",
    "engine us/token",
    "others us/token",
    "loop us/step",
    "engine us/step",
    "late us p50",
    "late us p99",
    "messages",
)
REQUEST_COLUMNS = ("prompt", "loop us", "engine us", "others us", "ms beside the device p50", "p99")
VOCAB_SIZE = 102400
NUM_LOGITS = 64  # the sampler's work is the device's
BLOCK_SIZE = 16
STEP_PROMPT = 64
NUM_REQUESTS = 100  # of each length


class SleepingModel:
    """Its device takes step_s for a batch, whatever is in it."""

    uses_kernels = False
    mtp = None
    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.step_s = 0.001
        self.num_steps = 0
        self.late_s: list[float] = []
        self.num_streams = 0
        self.marks: list[tuple[float, CpuTimes]] = []  # at steps in which that many streams decode

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        layer_done: LayerDone | None = None,
        *,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_steps += 1
        if batch.num_decodes == batch.num_tokens == self.num_streams:
            self.marks.append((time.perf_counter(), CpuTimes.now()))
        due_at = time.perf_counter() + self.step_s
        time.sleep(self.step_s)
        self.late_s.append(time.perf_counter() - due_at)
        if layer_done is not None:
            layer_done(0)
        return torch.zeros(batch.num_tokens if wanted_N is None else len(wanted_N), 1)

    def one_layer_of_each_kind(self) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden_ND.shape[0], NUM_LOGITS)

    def logits_into(self, out_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        out_NV.zero_()

    def take_expert_load(self) -> torch.Tensor | None:
        return None


def build_sleeping_engine(model: SleepingModel) -> Engine:
    layout = KvLayout(
        model_fingerprint="asleep", num_layers=1, token_shape=(1,), dtype="float32", block_size=BLOCK_SIZE
    )
    kv_cache = KvCache(layout, 40_000)
    limits = EngineLimits(max_model_len=8192, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({1}))
    config = SchedulerConfig(token_budget=8192, max_running=256)
    runner = Runner(model, kv_cache, Sampler(limits.eos_token_ids), config.token_budget, "cpu")
    return Engine(runner, kv_cache, limits, config)


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds so far."""

    loop: float
    engine: float
    others: float

    @classmethod
    def now(cls) -> CpuTimes:
        """On any thread."""
        [engine_thread] = [thread for thread in threading.enumerate() if thread.name == "engine"]
        loop, engine = map(_thread_cpu_s, (threading.main_thread(), engine_thread))
        return cls(loop, engine, time.process_time() - loop - engine)

    def minus(self, other: CpuTimes) -> CpuTimes:
        return CpuTimes(self.loop - other.loop, self.engine - other.engine, self.others - other.others)


def _thread_cpu_s(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


class Client:
    """The router's end of the link, in a process of its own; told what to do by lines."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> Client:
        argv = (sys.executable, "-m", "benchmarks.worker_overhead", "--client", self._address)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
        assert await self._answer() == ["ready"]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._process.terminate()
        await self._process.wait()

    async def visit(
        self, streams: int, prompt_len: int, num_tokens: int, num_rounds: int = 1
    ) -> tuple[int, list[float]]:
        """That many requests at once, some times over: messages that came, and seconds of each round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{streams} {prompt_len} {num_tokens} {num_rounds}\n".encode())
        num_messages, *seconds = await self._answer()
        return int(num_messages), [float(value) for value in seconds]

    async def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().split()


async def run_client(address: str) -> None:
    async with build_channel(address) as channel:
        link = channel.stream_stream(
            "/baton.v1.LinkService/Link",
            request_serializer=link_pb2.LinkRequest.SerializeToString,
            response_deserializer=link_pb2.LinkResponse.FromString,
        )(wait_for_ready=True)
        await link.read()
        print("ready", flush=True)
        rng = random.Random(os.getpid())
        next_key = 1
        while line := await asyncio.to_thread(sys.stdin.readline):
            streams, prompt_len, num_tokens, num_rounds = map(int, line.split())
            num_messages = 0
            seconds = []
            for _ in range(num_rounds):
                requests = [_request(rng, next_key + i, prompt_len, num_tokens) for i in range(streams)]
                next_key += streams
                began = time.perf_counter()
                for request in requests:
                    await link.write(request)
                num_ended = 0
                while num_ended < streams:
                    response: Any = await link.read()
                    num_messages += 1
                    num_ended += sum(update.finish_reason != 0 for update in response.updates)
                seconds.append(time.perf_counter() - began)
            print(num_messages, *seconds, flush=True)


def _request(rng: random.Random, key: int, prompt_len: int, num_tokens: int) -> link_pb2.LinkRequest:
    sampling = common_pb2.SamplingParams(
        top_p=1.0, repetition_penalty=1.0, seed=1, max_tokens=num_tokens, ignore_eos=True
    )
    sequence = common_pb2.SequenceSpec(
        request_id=str(key),
        prompt_ids=[rng.randrange(VOCAB_SIZE) for _ in range(prompt_len)],
        sampling=sampling,
        time_left_s=60.0,
    )
    return link_pb2.LinkRequest(submit=link_pb2.Submit(key=key, sequence=sequence))


@asynccontextmanager
async def running_worker(model: SleepingModel) -> AsyncIterator[str]:
    """Its address."""
    server = EmbeddedServer()
    redis_url = server.start()
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        settings = DecodeSettings(model=Path(directory), port=port, redis_url=redis_url, drain_s=1.0)
        process = WorkerProcess("decode", settings, build_service)
        engine = build_sleeping_engine(model)
        serving = asyncio.create_task(process._serve(engine, Store(redis_url), NO_TRACER, None))
        try:
            yield f"127.0.0.1:{port}"
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await serving
            server.stop()


async def bench_steps(client: Client, model: SleepingModel, streams: int, step_s: float) -> dict[str, float]:
    model.step_s = step_s
    model.num_streams = streams
    model.num_steps = 0
    model.late_s.clear()
    model.marks.clear()
    num_messages, _ = await client.visit(streams, STEP_PROMPT, 1 + max(20, round(2.0 / step_s)))
    (began, before), *_, (ended, after) = model.marks
    num_steps = len(model.marks) - 1
    spent = after.minus(before)
    per_token = 1e6 / (streams * num_steps)
    late = sorted(1e6 * value for value in model.late_s)
    return {
        "streams": streams,
        "tokens/s": streams * num_steps / (ended - began),
        "of the device's": num_steps * step_s / (ended - began),
        "loop us/token": spent.loop * per_token,
        "engine us/token": spent.engine * per_token,
        "others us/token": spent.others * per_token,
        "loop us/step": spent.loop / num_steps * 1e6,
        "engine us/step": spent.engine / num_steps * 1e6,
        "late us p50": percentile(late, 50),
        "late us p99": percentile(late, 99),
        "messages": num_messages / model.num_steps,
    }


async def bench_requests(client: Client, model: SleepingModel, prompt_len: int) -> dict[str, float]:
    model.step_s = 0.001
    await client.visit(1, prompt_len, 1)
    model.late_s.clear()
    before = CpuTimes.now()
    _, seconds = await client.visit(1, prompt_len, 1, NUM_REQUESTS)
    spent = CpuTimes.now().minus(before)
    walls = sorted(1e3 * (value - model.step_s) for value in seconds)
    return {
        "prompt": prompt_len,
        "loop us": spent.loop / NUM_REQUESTS * 1e6,
        "engine us": spent.engine / NUM_REQUESTS * 1e6,
        "others us": spent.others / NUM_REQUESTS * 1e6,
        "ms beside the device p50": percentile(walls, 50),
        "p99": percentile(walls, 99),
    }


async def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    configure_logging("json", "WARNING", service="decode")
    model = SleepingModel()
    async with running_worker(model) as address, Client(address) as client:
        await client.visit(32, STEP_PROMPT, 32)  # warm
        steps = [await bench_steps(client, model, n, options.step_ms / 1000) for n in options.streams]
        requests = [await bench_requests(client, model, n) for n in options.prompts]
    for columns, rows in ((STEP_COLUMNS, steps), (REQUEST_COLUMNS, requests)):
        print(*table(columns, rows), sep="\n")
        if options.write:
            what = "step" if rows is steps else "request"
            notes = [f"a step of the device takes {options.step_ms:g} ms; {__doc__.splitlines()[0]}"]
            print(write_result(f"worker-overhead-{what}", f"A worker's {what}", columns, rows, notes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the device")
    parser.add_argument("--write", action="store_true", help="JSON and Markdown into benchmarks/results")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    uvloop.run(run_client(options.client) if options.client else run(options))


if __name__ == "__main__":
    main()
