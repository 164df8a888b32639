"""The one connection between this router and one decode worker.

The life of a link:
1. start(): it connects, and again after every loss, until close().
2. Up: requests go down as they are submitted; each message that comes up is dealt out to the streams it
   names.
3. Lost, for whatever reason: every open stream ends with WorkerLost; the worker has cancelled them all.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import grpc

from kvstore.store import Backoff
from kvstore.worker_record import WorkerRecord
from proto import link_pb2, link_pb2_grpc
from router.own_load import OwnLoad
from servicekit.errors import ServingError, WorkerLost
from servicekit.logging import get_logger
from servicekit.rpc import ChannelFactory, build_channel, error_from_rpc

log = get_logger(__name__)

Taker = Callable[[link_pb2.SequenceUpdate], bool]

_CONNECT_TIMEOUT_S = 5.0
_LOAD_LASTS_S = 2.0  # then the registry's is newer
_END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class LinkStream:
    """The updates of one request, for one reader. close() cancels the request if it has not ended."""

    def __init__(self, link: Link, key: int) -> None:
        self._link = link
        self._key = key
        self.taker: Taker | None = None
        self._updates: list[link_pb2.SequenceUpdate] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[link_pb2.SequenceUpdate]:
        """Everything that has come since the last call, at least one update.

        Raises WorkerLost when the link broke, or what fail() was given; updates that came before are returned
        first. A slow reader delays nobody: updates wait here, at most max_tokens of them.

        While the reader waits here, `taker` is offered each update but the last one: what it takes (True) is
        not returned, and the reader sleeps on. To wake a task costs more than to pass on a token.
        """
        while not self._updates:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        updates, self._updates = self._updates, []
        return updates

    def push(self, update: link_pb2.SequenceUpdate, *, is_last: bool) -> None:
        waiter, taker = self._waiter, self.taker
        if taker is not None and waiter is not None and not (is_last or waiter.done()):
            try:
                if taker(update):
                    return
            except Exception as error:  # noqa: BLE001 - of this request; the link and the others go on
                self.fail(error)
                return
        self._updates.append(update)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream for its reader; the request is still to be closed."""
        if self._error is None:
            self._error = error
            self._wake()

    def close(self) -> None:
        self._link.cancel(self._key)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Link:
    def __init__(
        self,
        record: WorkerRecord,
        on_change: Callable[[], None],
        channels: ChannelFactory = build_channel,
    ) -> None:
        """`on_change` is called when the link comes up or is lost."""
        self.worker_id = record.worker_id
        self.incarnation = record.incarnation
        self.address = record.address
        self.is_up = False
        self.load: link_pb2.WorkerLoad | None = None  # told on this link, not long ago
        self.own = OwnLoad()
        self._told_at = 0.0
        self._was_up = False  # since it was last lost
        self._on_change = on_change
        self._channels = channels
        self._streams: dict[int, LinkStream] = {}
        self._keys = itertools.count(1)
        self._outgoing: asyncio.Queue[link_pb2.LinkRequest] = asyncio.Queue()
        self._idle = asyncio.Event()  # no stream is open
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link {self.worker_id}")

    async def close(self) -> None:
        """Open streams end with WorkerLost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def close_when_idle(self) -> None:
        await self._idle.wait()
        await self.close()

    def submit(self, submit: link_pb2.Submit) -> LinkStream:
        """Takes `submit` over and fills in its key. WorkerLost when the link is not up."""
        if not self.is_up:
            raise WorkerLost(f"the link to {self.worker_id} is not up")
        submit.key = next(self._keys)
        stream = self._streams[submit.key] = LinkStream(self, submit.key)
        self._idle.clear()
        self.own.begin()
        self._outgoing.put_nowait(link_pb2.LinkRequest(submit=submit))
        return stream

    def registry_told(self) -> None:
        """A load came by the registry. On the link it comes with tokens, so that of an idle one is old."""
        if time.monotonic() - self._told_at > _LOAD_LASTS_S:
            self.load = None
            self.own.told()

    def cancel(self, key: int) -> None:
        """Nothing more comes for this key. Idempotent."""
        if self._forget(key):
            self._outgoing.put_nowait(link_pb2.LinkRequest(cancel=link_pb2.Cancel(key=key)))

    async def _run(self) -> None:
        backoff = Backoff()
        task = asyncio.current_task()
        assert task is not None
        # grpc.aio loses a cancellation that meets a refused connection: ask the task, not only the exception.
        while not task.cancelling():
            error: ServingError
            try:
                await self._connect_and_read(backoff)
                error = WorkerLost(f"{self.worker_id} closed the link")
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, peer=self.worker_id)
            except TimeoutError:
                error = WorkerLost(f"{self.worker_id} cannot be reached at {self.address}")
            finally:
                self._lose()
            if not task.cancelling():
                log.warning("link_lost", worker_id=self.worker_id, reason=str(error))
                await asyncio.sleep(backoff.next_s())

    async def _connect_and_read(self, backoff: Backoff) -> None:
        async with self._channels(self.address) as channel:
            call = link_pb2_grpc.LinkServiceStub(channel).Link()  # type: ignore[no-untyped-call]
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                response = await call.read()  # the worker tells its load at once
            writer = asyncio.create_task(self._write(call))
            try:
                self.is_up = self._was_up = True
                self._on_change()
                log.info("link_up", worker_id=self.worker_id, address=self.address)
                while response is not _END:
                    backoff.reset()
                    self._receive(response)
                    response = await call.read()
            finally:
                self.is_up = False
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                call.cancel()

    async def _write(self, call: Any) -> None:
        """Ends with an error when the call ends; the reader sees the same and reports it."""
        while True:
            await call.write(await self._outgoing.get())

    def _receive(self, response: link_pb2.LinkResponse) -> None:
        if response.HasField("load"):
            self.load = response.load
            self._told_at = time.monotonic()
            self.own.told()
        for update in response.updates:
            stream = self._streams.get(update.key)
            if stream is None:
                continue  # cancelled while it was on its way
            is_last = bool(update.finish_reason) or update.HasField("error")
            if is_last:
                self._forget(update.key)
            stream.push(update, is_last=is_last)

    def _forget(self, key: int) -> bool:
        is_known = self._streams.pop(key, None) is not None
        if is_known:
            self.own.end()
        if not self._streams:
            self._idle.set()
        return is_known

    def _lose(self) -> None:
        was_up, self._was_up = self._was_up, False
        streams, self._streams = self._streams, {}
        self._idle.set()
        self._outgoing = asyncio.Queue()
        self.load = None
        self.own.end(len(streams))
        for stream in streams.values():
            stream.fail(WorkerLost(f"the link to {self.worker_id} was lost"))
        if was_up:
            self._on_change()
