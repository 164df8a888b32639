"""What waits to go up one link: everything that a step made, as few messages as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from proto.link_pb2 import LinkResponse, SequenceUpdate

# Of updates in one message. Far below the message limit, far above the updates of an ordinary step.
MAX_UPDATE_BYTES = 1 << 20
_FRAME_BYTES = 24  # of an update beside its tokens, at most
_TOKEN_BYTES = 5  # at most


class LinkUpdates:
    """In order. A message holds at most MAX_UPDATE_BYTES, or one update."""

    def __init__(self) -> None:
        self.num_tokens = 0  # so far
        self._messages: list[LinkResponse] = []
        self._has_any = asyncio.Event()
        self._room = 0  # bytes that the last message may still take
        self._add: Callable[..., Any]  # of the last message's updates

    def add_tokens(self, key: int, token_ids: Sequence[int]) -> None:
        """An update of nothing else. Runs for every token: made in its message, because to make a protobuf
        object and copy it there costs twice as much."""
        num_tokens = len(token_ids)
        self.num_tokens += num_tokens
        num_bytes = _FRAME_BYTES + _TOKEN_BYTES * num_tokens
        if num_bytes > self._room:
            self._begin()
        self._room -= num_bytes
        self._add(key=key, token_ids=token_ids)

    def add(self, update_pb: SequenceUpdate) -> None:
        self.num_tokens += len(update_pb.token_ids)
        num_bytes = update_pb.ByteSize()
        if num_bytes > self._room:
            self._begin()
        self._room -= num_bytes
        self._messages[-1].updates.append(update_pb)

    async def take(self) -> list[LinkResponse]:
        """At least one message, for the caller to complete; of a step all, since the outputs of one are
        delivered before anybody wakes."""
        await self._has_any.wait()
        self._has_any.clear()
        messages, self._messages, self._room = self._messages, [], 0
        return messages

    def _begin(self) -> None:
        message = LinkResponse()
        self._messages.append(message)
        self._add = message.updates.add
        self._room = MAX_UPDATE_BYTES
        self._has_any.set()
