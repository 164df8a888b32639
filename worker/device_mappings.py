"""Caches of other workers on this machine that this one copies from by itself, from device to device.

A worker tells of its cache in the first hand-off from it. The cache is then mapped beside the hand-offs, and
later ones name it: nothing ever waits for a mapping, and none that fails fails a hand-off. A worker that has
started anew has a cache of another name, which takes the place of the old one.

A mapping keeps the memory of a dead worker taken, and the next one on that device needs it. So it is looked
every second whether the owner's process is there: its mapping ends with it, or with the last copy from it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from engine.cuda_ipc import MemoryHandle
from engine.kv_cache import PeerKvCache
from engine.kv_export import KvExport
from proto.prefill_pb2 import DeviceKvCache
from servicekit.logging import get_logger

WATCH_S = 1.0

OpenPeer = Callable[[KvExport], PeerKvCache]

log = get_logger(__name__)


class MappedCache(NamedTuple):
    name: str
    cache: PeerKvCache


@dataclass(slots=True, eq=False)
class _Mapping:
    mapped: MappedCache
    owner: psutil.Process
    num_users: int = 0
    has_ended: bool = False  # closed when the last user leaves


class DeviceMappings:
    """In the loop. Opening and closing take milliseconds, and may wait for the device: they happen in
    threads."""

    def __init__(self, open_peer: OpenPeer, *, watch_s: float = WATCH_S) -> None:
        self._open_peer = open_peer
        self._watch_s = watch_s
        self._watch: asyncio.TimerHandle | None = None  # while something is mapped
        self._mappings: dict[str, _Mapping] = {}  # by the worker's address
        self._known: set[str] = set()  # names that are mapped, or will be, or were refused
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def offered(self, offer_pb: DeviceKvCache, address: str) -> None:
        """The worker at `address` has this cache. It is tried once."""
        if offer_pb.name not in self._known and not self._is_closing:
            self._known.add(offer_pb.name)
            self._spawn(self._map(offer_pb, address))

    @contextmanager
    def mapped(self, address: str) -> Iterator[MappedCache | None]:
        """The cache of the worker at `address`, if it is mapped: inside the block it stays so."""
        mapping = self._mappings.get(address)
        if mapping is None:
            yield None
            return
        mapping.num_users += 1
        try:
            yield mapping.mapped
        finally:
            mapping.num_users -= 1
            self._close_unused(mapping)

    async def close(self) -> None:
        """After the last transfer."""
        self._is_closing = True
        await self._settled()
        for address in list(self._mappings):
            self._end(address)
        if self._watch is not None:
            self._watch.cancel()
        await self._settled()

    async def _settled(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _map(self, offer_pb: DeviceKvCache, address: str) -> None:
        began = time.monotonic()
        exported = export_from_pb(offer_pb)
        try:
            # Found before the cache is opened: an owner that is gone by then has none that opens.
            owner = psutil.Process(exported.pid)
            cache = await asyncio.to_thread(self._open_peer, exported)
        except (OSError, ValueError, RuntimeError, psutil.Error) as error:
            log.warning("device_memory_refused", peer_address=address, reason=str(error))
            return
        if address in self._mappings:
            self._end(address)
        self._mappings[address] = _Mapping(MappedCache(exported.name, cache), owner)
        if self._watch is None:
            self._look_at_owners()
        log.info(
            "device_memory_mapped",
            peer_address=address,
            device=exported.memory.device_uuid,
            num_blocks=exported.num_blocks,
            elapsed_s=time.monotonic() - began,
        )

    def _look_at_owners(self) -> None:
        for address, mapping in list(self._mappings.items()):
            if not _is_alive(mapping.owner):
                log.info("device_memory_unmapped", peer_address=address, num_users=mapping.num_users)
                self._end(address)
        self._watch = None
        if self._mappings:
            self._watch = asyncio.get_running_loop().call_later(self._watch_s, self._look_at_owners)

    def _end(self, address: str) -> None:
        mapping = self._mappings.pop(address)
        self._known.discard(mapping.mapped.name)
        mapping.has_ended = True
        self._close_unused(mapping)

    def _close_unused(self, mapping: _Mapping) -> None:
        if mapping.has_ended and mapping.num_users == 0:
            self._spawn(asyncio.to_thread(mapping.mapped.cache.close))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("device_memory_broke", reason=f"{type(error).__name__}: {error}")


def _is_alive(process: psutil.Process) -> bool:
    """And not another one of the same id."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def export_to_pb(exported: KvExport) -> DeviceKvCache:
    return DeviceKvCache(
        name=exported.name,
        pid=exported.pid,
        num_blocks=exported.num_blocks,
        handle=exported.memory.handle,
        offset_bytes=exported.memory.offset_bytes,
        device_uuid=exported.memory.device_uuid,
    )


def export_from_pb(offer_pb: DeviceKvCache) -> KvExport:
    memory = MemoryHandle(offer_pb.handle, offer_pb.offset_bytes, offer_pb.device_uuid)
    return KvExport(name=offer_pb.name, pid=offer_pb.pid, num_blocks=offer_pb.num_blocks, memory=memory)
