"""KV caches of other workers on this host, attached while they are in use and a while after.

A mapping keeps the memory of a dead worker alive, so it must end by itself: nobody tells us of the death of a
worker that we have no call to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.kv_cache import AttachedKvCache, KvCache
from engine.kv_layout import KvLayout
from proto.prefill_pb2 import SharedKvCache
from servicekit.errors import HandoffFailed

IDLE_S = 10.0

Attach = Callable[[str, KvLayout, int], AttachedKvCache]


@dataclass(slots=True)
class _Entry:
    cache: AttachedKvCache
    num_users: int = 0
    closing: asyncio.TimerHandle | None = None  # while there are no users


class SharedCaches:
    def __init__(self, layout: KvLayout, *, attach: Attach = KvCache.attach, idle_s: float = IDLE_S) -> None:
        self._layout = layout
        self._attach = attach
        self._idle_s = idle_s
        self._entries: dict[str, _Entry] = {}  # by name, which no other incarnation of a worker has
        self._unattachable: set[str] = set()  # addresses of workers

    def can_attach(self, address: str) -> bool:
        """False once attaching that worker's cache has failed: its chunks come in the stream from then on."""
        return address not in self._unattachable

    @contextmanager
    def cache(self, shared_pb: SharedKvCache, address: str) -> Iterator[AttachedKvCache]:
        """The cache of the worker at `address`, mapped inside the block. Raises HandoffFailed."""
        entry = self._entries.get(shared_pb.name)
        if entry is None:
            entry = self._entries[shared_pb.name] = _Entry(self._attached(shared_pb, address))
        if entry.closing is not None:
            entry.closing.cancel()
            entry.closing = None
        entry.num_users += 1
        try:
            yield entry.cache
        finally:
            entry.num_users -= 1
            if entry.num_users == 0:
                loop = asyncio.get_running_loop()
                entry.closing = loop.call_later(self._idle_s, self._close, shared_pb.name)

    def close(self) -> None:
        """After the last transfer."""
        for name, entry in list(self._entries.items()):
            if entry.closing is not None:
                entry.closing.cancel()
            self._close(name)

    def _close(self, name: str) -> None:
        self._entries.pop(name).cache.close()

    def _attached(self, shared_pb: SharedKvCache, address: str) -> AttachedKvCache:
        try:
            expected_bytes = shared_pb.num_blocks * self._layout.block_bytes
            if shared_pb.size_bytes != expected_bytes:
                raise ValueError(f"{shared_pb.num_blocks} blocks are {expected_bytes} bytes")
            return self._attach(shared_pb.name, self._layout, shared_pb.num_blocks)
        except (OSError, ValueError) as error:
            self._unattachable.add(address)
            raise HandoffFailed(
                f"cannot attach the shared cache of {address}: {error}", state="TRANSFERRING"
            ) from error
