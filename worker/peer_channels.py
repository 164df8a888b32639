"""One gRPC channel for each worker address in use, kept while it is used and a while after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from servicekit.rpc import ChannelFactory, build_channel

IDLE_S = 60.0


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    num_users: int = 0
    idle_since: float = field(default=0.0)  # event loop time


class PeerChannels:
    def __init__(self, channels: ChannelFactory = build_channel, idle_s: float = IDLE_S) -> None:
        self._channels = channels
        self._idle_s = idle_s
        self._entries: dict[str, _Entry] = {}

    @property
    def addresses(self) -> list[str]:
        return list(self._entries)

    @asynccontextmanager
    async def channel(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """Use the channel to `address`; channels that nobody used for idle_s are closed on the way."""
        await self._close_idle()
        entry = self._entries.get(address)
        if entry is None:
            entry = self._entries[address] = _Entry(self._channels(address))
        entry.num_users += 1
        try:
            yield entry.channel
        finally:
            entry.num_users -= 1
            entry.idle_since = asyncio.get_running_loop().time()

    async def discard(self, address: str) -> None:
        """The worker there is gone: do not keep its channel (calls still on it go on)."""
        entry = self._entries.get(address)
        if entry is not None and entry.num_users == 0:
            del self._entries[address]
            await entry.channel.close(None)

    async def close(self) -> None:
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            await entry.channel.close(None)

    async def _close_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for address, entry in list(self._entries.items()):
            if entry.num_users == 0 and now - entry.idle_since >= self._idle_s:
                await self.discard(address)
