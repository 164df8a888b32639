"""Makes the peer sources of a worker's sequences, and owns their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager

from proto.link_pb2 import Submit
from proto.prefill_pb2 import PrefillRequest
from worker.deadline import Deadline
from worker.fetch_metrics import FetchMetrics
from worker.fetch_rates import FetchRates
from worker.peer_source import PROGRESS_S, FetchEnvironment, PeerSource
from worker.transfers import TransferEnvironment


class PeerFetcher:
    def __init__(
        self,
        transfers: TransferEnvironment,
        metrics: FetchMetrics,
        *,
        worker_id: str,
        progress_s: float = PROGRESS_S,
    ) -> None:
        self.rates = FetchRates()
        self._worker_id = worker_id
        self._tasks: set[asyncio.Task[None]] = set()
        self._environment = FetchEnvironment(
            transfers=transfers,
            metrics=metrics,
            rates=self.rates,
            spawn=self._spawn,
            progress_s=progress_s,
        )

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    @contextmanager
    def offered(self, request_pb: Submit | PrefillRequest, deadline: Deadline) -> Iterator[PeerSource | None]:
        """A source for the one sequence of the block, which reads nothing any more soon after its end. None:
        the router offers no peer, or this worker itself."""
        peer_pb = request_pb.peer
        source = PeerSource(self._environment, request_pb.sequence, peer_pb, deadline)
        if source.num_blocks == 0 or peer_pb.worker_id == self._worker_id:
            yield None
            return
        try:
            yield source
        finally:
            source.close()

    async def close(self) -> None:
        """Loads that go on fail."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
