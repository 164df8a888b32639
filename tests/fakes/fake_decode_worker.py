"""A decode worker without an engine: a real gRPC server whose tokens follow a script.

The script gives the next token from prompt and output so far, so that a sequence goes on alike on any worker.
Tests hold it at a point, let it go, kill it, and look at what it was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvstore.worker_record import WorkerLoad, WorkerRecord
from proto import common_pb2, link_pb2, link_pb2_grpc
from servicekit.rpc import build_server

Script = Callable[[Sequence[int], Sequence[int]], int]


def cycling_script(token_ids: Sequence[int]) -> Script:
    """The given tokens, over and over."""
    return lambda prompt, output: token_ids[len(output) % len(token_ids)]


def mixing_script(vocab_size: int, first_id: int = 3) -> Script:
    """A token that depends on everything before it."""

    def script(prompt: Sequence[int], output: Sequence[int]) -> int:
        return first_id + (sum(prompt) * 31 + sum(output) * 7 + len(output) * 13) % (vocab_size - first_id)

    return script


def decode_record(worker_id: str, address: str, **fields: Any) -> WorkerRecord:
    record = WorkerRecord(
        worker_id=worker_id,
        incarnation=f"{worker_id}-1",
        role="decode",
        model="test",
        address=address,
        metrics_address="",
        group_id=worker_id,
        ep_rank=0,
        ep_size=1,
        model_fingerprint="weights",
        layout_fingerprint="layout",
        block_size=4,
        max_model_len=512,
        num_blocks=1000,
        host_id="host",
        load=WorkerLoad(),
    )
    return replace(record, **fields)


@dataclass
class FakeDecodeWorker(link_pb2_grpc.LinkServiceServicer):
    script: Script
    eos_id: int = 2
    tokens_per_update: int = 1
    step_s: float = 0.0
    num_hit_tokens: int = 0
    is_held: bool = False  # emits nothing until released
    hold_after: int | None = None  # tokens of a sequence, then it waits
    errors: list[common_pb2.Error] = field(default_factory=list)  # answered instead, one a submission
    submits: list[link_pb2.Submit] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)  # keys
    num_emitted: int = 0  # tokens
    num_links_broken: int = 0
    active: set[int] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, port: int = 0) -> str:
        self._server, self.port = build_server([], host="127.0.0.1", port=port)
        link_pb2_grpc.add_LinkServiceServicer_to_server(self, self._server)
        await self._server.start()
        return f"127.0.0.1:{self.port}"

    async def kill(self) -> None:
        """Every link breaks at once."""
        await self._server.stop(None)

    async def release(self) -> None:
        self.is_held = False
        self.hold_after = None
        self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    async def Link(  # noqa: N802
        self, requests: AsyncIterator[link_pb2.LinkRequest], context: Any
    ) -> AsyncIterator[link_pb2.LinkResponse]:
        updates: asyncio.Queue[link_pb2.SequenceUpdate] = asyncio.Queue()
        tasks: dict[int, asyncio.Task[None]] = {}
        reader = asyncio.create_task(self._read(requests, updates, tasks))
        try:
            yield link_pb2.LinkResponse(load=link_pb2.WorkerLoad())
            while True:
                batch = [await updates.get()]
                while not updates.empty():
                    batch.append(updates.get_nowait())
                load = link_pb2.WorkerLoad(num_running=len(self.active))
                yield link_pb2.LinkResponse(updates=batch, load=load)
        finally:
            reader.cancel()
            self.num_links_broken += 1
            for task in tasks.values():
                task.cancel()
            self._notify()

    async def _read(
        self,
        requests: AsyncIterator[link_pb2.LinkRequest],
        updates: asyncio.Queue[link_pb2.SequenceUpdate],
        tasks: dict[int, asyncio.Task[None]],
    ) -> None:
        async for request in requests:
            if request.HasField("submit"):
                key = request.submit.key
                assert key not in tasks
                self.submits.append(request.submit)
                self.active.add(key)
                tasks[key] = asyncio.create_task(self._generate(request.submit, updates))
                tasks[key].add_done_callback(lambda _, key=key: self._ended(key))
            else:
                self.cancelled.append(request.cancel.key)
                tasks[request.cancel.key].cancel()
                await asyncio.gather(tasks[request.cancel.key], return_exceptions=True)
            self._notify()

    async def _generate(
        self, submit: link_pb2.Submit, updates: asyncio.Queue[link_pb2.SequenceUpdate]
    ) -> None:
        if self.errors:
            updates.put_nowait(link_pb2.SequenceUpdate(key=submit.key, error=self.errors.pop(0)))
            return
        spec = submit.sequence
        output = list(spec.output_ids)
        is_first = True
        finish_reason = 0
        while not finish_reason:
            await self.until(
                lambda: not self.is_held and (self.hold_after is None or len(output) < self.hold_after)
            )
            new: list[int] = []
            while len(new) < self.tokens_per_update and not finish_reason:
                if self.hold_after is not None and len(output) >= self.hold_after:
                    break
                new.append(self.script(spec.prompt_ids, output))
                output.append(new[-1])
                finish_reason = self._finish_reason(spec.sampling, output)
            update = link_pb2.SequenceUpdate(key=submit.key, token_ids=new, finish_reason=finish_reason)
            if spec.sampling.HasField("num_logprobs"):
                update.logprobs.extend(_logprobs(id, spec.sampling.num_logprobs) for id in new)
            if is_first:
                self._describe_first(update, submit)
                is_first = False
            if finish_reason:
                self.active.discard(submit.key)  # the load sent with its end no longer counts it
            updates.put_nowait(update)
            self.num_emitted += len(new)
            self._notify()
            await asyncio.sleep(self.step_s)

    def _describe_first(self, update: link_pb2.SequenceUpdate, submit: link_pb2.Submit) -> None:
        update.timings.num_hit_tokens = self.num_hit_tokens
        update.timings.prefill_worker_id = submit.prefill_worker_id
        sampling = submit.sequence.sampling
        if sampling.HasField("num_prompt_logprobs"):
            ids = submit.sequence.prompt_ids[1:]
            update.prompt_logprobs.extend(_logprobs(id, sampling.num_prompt_logprobs) for id in ids)

    def _finish_reason(self, sampling: common_pb2.SamplingParams, output: Sequence[int]) -> int:
        may_stop = len(output) > sampling.min_tokens
        is_eos = output[-1] == self.eos_id and not sampling.ignore_eos
        if may_stop and (is_eos or output[-1] in sampling.stop_token_ids):
            return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if len(output) >= sampling.max_tokens else 0

    def _ended(self, key: int) -> None:
        self.active.discard(key)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _logprobs(token_id: int, num_top: int) -> common_pb2.TokenLogprobs:
    top = [token_id + offset for offset in range(num_top)]
    return common_pb2.TokenLogprobs(
        token_id=token_id, logprob=-0.5, top_token_ids=top, top_logprobs=[-0.5 - i for i in range(num_top)]
    )
