"""KV caches of prefill workers on this host, attached once for each incarnation of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.kv_cache import AttachedKvCache, KvCache
from engine.kv_layout import KvLayout
from proto.prefill_pb2 import PrefillStarted
from servicekit.errors import HandoffFailed

Attach = Callable[[str, KvLayout, int], AttachedKvCache]


@dataclass(slots=True)
class _Entry:
    name: str
    cache: AttachedKvCache
    num_users: int = 0
    is_current: bool = True  # False: the worker has another cache by now


class SharedCaches:
    def __init__(self, layout: KvLayout, attach: Attach = KvCache.attach) -> None:
        self._layout = layout
        self._attach = attach
        self._entries: dict[str, _Entry] = {}  # worker id -> its present cache

    @contextmanager
    def cache(self, started_pb: PrefillStarted) -> Iterator[AttachedKvCache]:
        """The cache that `started_pb` names, mapped until the end of the block. Raises HandoffFailed."""
        entry = self._entry(started_pb)
        entry.num_users += 1
        try:
            yield entry.cache
        finally:
            entry.num_users -= 1
            _close_unused(entry)

    def discard(self, worker_id: str) -> None:
        """The worker is gone or has been restarted."""
        entry = self._entries.pop(worker_id, None)
        if entry is not None:
            entry.is_current = False
            _close_unused(entry)

    def close(self) -> None:
        for worker_id in list(self._entries):
            self.discard(worker_id)

    def _entry(self, started_pb: PrefillStarted) -> _Entry:
        shared_pb = started_pb.shared_kv_cache
        entry = self._entries.get(started_pb.worker_id)
        if entry is not None and entry.name == shared_pb.name:
            return entry
        self.discard(started_pb.worker_id)
        expected_bytes = shared_pb.num_blocks * self._layout.block_bytes
        if shared_pb.size_bytes != expected_bytes:
            raise HandoffFailed(
                f"a shared cache of {shared_pb.num_blocks} blocks has {expected_bytes} bytes, "
                f"{started_pb.worker_id} says {shared_pb.size_bytes}",
                state="RESERVED",
            )
        try:
            cache = self._attach(shared_pb.name, self._layout, shared_pb.num_blocks)
        except (OSError, ValueError) as error:
            raise HandoffFailed(
                f"cannot attach the shared cache of {started_pb.worker_id}: {error}", state="RESERVED"
            ) from error
        entry = self._entries[started_pb.worker_id] = _Entry(shared_pb.name, cache)
        return entry


def _close_unused(entry: _Entry) -> None:
    if not entry.is_current and entry.num_users == 0:
        entry.cache.close()
