"""The workers this router knows, and its links to the decode workers among them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any, cast

from kvstore.registry import Registry, WorkerRecord
from router.link import Link
from router.own_load import OwnLoad
from router.worker_rates import WorkerRates, resolve_rates
from servicekit.logging import get_logger
from servicekit.rpc import ChannelFactory, build_channel

log = get_logger(__name__)

# A prefill worker that failed a hand-off is left alone for so long: if it is dead, its lease ends meanwhile.
_SUSPECT_S = 5.0


class Fleet:
    """Follows the registry. While Redis is away it goes on with the workers it knows."""

    def __init__(self, registry: Registry, channels: ChannelFactory = build_channel) -> None:
        self._registry = registry
        self._channels = channels
        self._records: dict[str, WorkerRecord] = {}
        self._links: dict[str, Link] = {}
        self._own_loads: dict[str, OwnLoad] = {}  # of prefill workers, by incarnation
        self._rates: dict[str, WorkerRates] = {}
        self._retired: set[asyncio.Task[None]] = set()  # links of gone workers, ending
        self._changed = asyncio.Event()
        self._suspect_until: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="fleet")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._retired)
        self._links.clear()

    @property
    def has_failed(self) -> bool:
        """It no longer follows the registry: only a new process helps."""
        return self._task is not None and self._task.done()

    @property
    def is_ready(self) -> bool:
        """A request could be served now."""
        is_following = self._task is not None and not self._task.done()
        return is_following and bool(self.decode_workers())

    def decode_workers(self) -> list[tuple[WorkerRecord, Link]]:
        """Those that take requests now, by worker id."""
        return [
            (record, link)
            for worker_id, link in sorted(self._links.items())
            if link.is_up and not (record := self._records[worker_id]).is_draining
        ]

    def prefill_workers(self) -> list[WorkerRecord]:
        """Those that take prompts now, by worker id."""
        now = time.monotonic()
        return [
            record
            for worker_id, record in sorted(self._records.items())
            if record.role == "prefill"
            and not record.is_draining
            and self._suspect_until.get(record.incarnation, 0.0) <= now
        ]

    def workers(self) -> list[tuple[WorkerRecord, Link | None]]:
        """All that are registered, in any state, with the links of those that decode; by worker id."""
        return [(record, self._links.get(worker_id)) for worker_id, record in sorted(self._records.items())]

    def own_load(self, record: WorkerRecord) -> OwnLoad:
        """What this router has at a prefill worker. That of a decode worker is its link's."""
        return self._own_loads[record.incarnation]

    def rates(self, worker_id: str) -> WorkerRates:
        return self._rates[worker_id]

    def is_suspected(self, record: WorkerRecord) -> bool:
        return self._suspect_until.get(record.incarnation, 0.0) > time.monotonic()

    def max_model_len(self) -> int | None:
        """The shortest context among the decode workers; None while there is none."""
        lengths = [record.max_model_len for record in self._records.values() if record.role == "decode"]
        return min(lengths, default=None)

    def suspect(self, worker_id: str) -> None:
        """A hand-off from this prefill worker failed."""
        record = self._records.get(worker_id)
        if record is not None:
            self._suspect_until[record.incarnation] = time.monotonic() + _SUSPECT_S
            log.warning("prefill_worker_suspected", worker_id=worker_id, seconds=_SUSPECT_S)

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Until workers or links change; False when that takes longer."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    async def _follow(self) -> None:
        try:
            async with aclosing(cast(Any, self._registry.watch())) as listings:
                async for records in listings:
                    self._update(records)
        except Exception:
            log.exception("fleet_failed")  # /health turns to 503, so that this router is started again
            raise

    def _update(self, records: list[WorkerRecord]) -> None:
        self._note_loads(records)
        self._records = {record.worker_id: record for record in records}
        self._rates = dict(zip(self._records, resolve_rates(records), strict=True))
        decode = {record.worker_id: record for record in records if record.role == "decode"}
        for worker_id, link in list(self._links.items()):
            record = decode.get(worker_id)
            if record is None or (record.incarnation, record.address) != (link.incarnation, link.address):
                self._retire(worker_id)
        for worker_id, record in decode.items():
            if worker_id not in self._links:
                self._links[worker_id] = Link(record, self._notify, self._channels)
                self._links[worker_id].start()
        alive = {record.incarnation for record in records}
        self._suspect_until = {key: end for key, end in self._suspect_until.items() if key in alive}
        self._notify()

    def _note_loads(self, records: list[WorkerRecord]) -> None:
        known, self._own_loads = self._own_loads, {}
        for record in records:
            last = self._records.get(record.worker_id)
            is_new = last is None or last.load != record.load
            if record.role == "prefill":
                own = self._own_loads[record.incarnation] = known.get(record.incarnation) or OwnLoad()
                if is_new:
                    own.told()
            elif is_new and record.worker_id in self._links:
                self._links[record.worker_id].registry_told()

    def _retire(self, worker_id: str) -> None:
        """The worker left the registry but may still be finishing: its link stays until no stream is open."""
        task = asyncio.create_task(self._links.pop(worker_id).close_when_idle())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
