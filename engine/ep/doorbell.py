"""The doorbell between the ranks of a group: small messages outside the collectives, heard by a thread.

A message is one byte of kind and eight of number. A connection that ends without BYE is a lost rank: the
operating system closes the connections of a killed process at once, which makes this the fast failure
detector.
"""

from __future__ import annotations

import enum
import selectors
import socket
import struct
import threading
from collections.abc import Callable

_MESSAGE = struct.Struct("!BQ")
_MAX_JOIN_S = 2.0


class _Kind(enum.IntEnum):
    RING = 1  # number: the epoch to wake in
    READY = 2
    LEAVING = 3
    BYE = 4  # the group has ended by agreement; end of connection follows
    LOST = 5  # number: a rank that the sender has lost; end of connection follows


class Doorbell:
    """Owns the connections to the peers and the thread that reads them. Sending is thread-safe."""

    def __init__(self, connections: dict[int, socket.socket], on_change: Callable[[], None]) -> None:
        """on_change is called on the listening thread after the properties below have changed."""
        self._connections = connections
        self._on_change = on_change
        self._changed = threading.Condition()
        self._rung_epoch = -1
        self._ranks: dict[_Kind, set[int]] = {kind: set() for kind in _Kind}
        self._lost: dict[int, None] = {}  # an ordered set
        self._closer, self._closed_signal = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="ep-doorbell", daemon=True)
        self._thread.start()

    @property
    def rung_epoch(self) -> int:
        """Largest epoch that this rank has rung or heard; -1 before the first."""
        return self._rung_epoch

    @property
    def leaving_ranks(self) -> frozenset[int]:
        with self._changed:
            return frozenset(self._ranks[_Kind.LEAVING])

    @property
    def lost_ranks(self) -> tuple[int, ...]:
        """In the order in which they were lost."""
        with self._changed:
            return tuple(self._lost)

    def ring(self, epoch: int) -> None:
        with self._changed:
            self._rung_epoch = max(self._rung_epoch, epoch)
        self._send(_Kind.RING, epoch)

    def announce_ready(self) -> None:
        self._send(_Kind.READY)

    def announce_leaving(self) -> None:
        self._send(_Kind.LEAVING)

    def wait_until_all_ready(self, timeout_s: float) -> bool:
        """False when a rank is lost or time is up first."""
        with self._changed:
            return (
                self._changed.wait_for(
                    lambda: bool(self._lost) or self._ranks[_Kind.READY] == self._connections.keys(),
                    timeout_s,
                )
                and not self._lost
            )

    def wait_for_loss(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._lost), timeout_s)

    def say_bye(self, timeout_s: float) -> None:
        """Tell the peers that this rank has seen the group's end, and wait until they have, or are gone."""
        self._send(_Kind.BYE)
        with self._changed:
            self._changed.wait_for(
                lambda: self._ranks[_Kind.BYE] | self._lost.keys() == self._connections.keys(), timeout_s
            )

    def close(self) -> None:
        if self.lost_ranks:  # so that the others blame the rank that failed, not those that close after it
            self._send(_Kind.LOST, self.lost_ranks[0])
        self._closer.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_MAX_JOIN_S)
        for connection in self._connections.values():
            connection.close()
        self._closed_signal.close()

    def _send(self, kind: _Kind, number: int = 0) -> None:
        message = _MESSAGE.pack(kind, number)
        for connection in self._connections.values():
            try:
                connection.sendall(message)  # nine bytes: atomic, and the peer's thread always reads
            except OSError:
                continue  # the listening thread sees the same end and reports it

    def _listen(self) -> None:
        unread = dict.fromkeys(self._connections, b"")
        is_closing = False
        with selectors.DefaultSelector() as selector:
            selector.register(self._closed_signal, selectors.EVENT_READ, None)
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            try:
                while not is_closing:
                    for key, _ in selector.select():
                        if key.data is None:
                            is_closing = True
                        else:
                            unread[key.data] = self._read(key.data, unread[key.data], selector)
                    self._on_change()
            finally:
                if not is_closing:  # a callback failed: without ears, every peer counts as lost
                    with self._changed:
                        self._lost.update(dict.fromkeys(self._connections))
                        self._changed.notify_all()

    def _read(self, rank: int, unread: bytes, selector: selectors.BaseSelector) -> bytes:
        """Take what has arrived; returns the start of an incomplete message."""
        try:
            data = self._connections[rank].recv(4096)
        except OSError:
            data = b""
        buffer = unread + data
        num_whole = len(buffer) // _MESSAGE.size * _MESSAGE.size
        with self._changed:
            for kind, number in _MESSAGE.iter_unpack(buffer[:num_whole]):
                self._take(rank, _Kind(kind), number)
            if not data:
                selector.unregister(self._connections[rank])
                if rank not in self._ranks[_Kind.BYE]:
                    self._lost[rank] = None
            self._changed.notify_all()
        return buffer[num_whole:]

    def _take(self, rank: int, kind: _Kind, number: int) -> None:
        if kind is _Kind.RING:
            self._rung_epoch = max(self._rung_epoch, number)
        elif kind is _Kind.LOST:
            self._lost[number] = None
        else:
            self._ranks[kind].add(rank)
