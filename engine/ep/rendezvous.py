"""How the ranks of a group find each other. Everything here blocks, until a deadline.

1. Rank 0 listens at the group's address with a key-value store; the others connect to it.
2. Ranks check that they agree on the size and that no two claim the same rank.
3. Each rank opens a doorbell listener on the interface that faces rank 0 and posts its address. It
   connects to all lower ranks and accepts all higher ones; a random nonce from the store keeps strangers
   out.
4. The collectives' process group connects through the same store. Afterwards the store is idle.
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

_HELLO = struct.Struct("!32sI")  # nonce, rank of the caller
_MAX_HELLO_S = 2.0
# A peer whose machine vanished sends no FIN: probe a silent connection after 5 s, give up 3 probes later.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class Joined:
    """What one rank holds after joining; the receiver owns it all."""

    process_group: ProcessGroupGloo
    store: Store  # on rank 0 the server, which must outlive the others' use of it
    connections: dict[int, socket.socket]  # rank of the peer -> doorbell connection


def join(rank: int, size: int, address: str, timeout_s: float) -> Joined:
    """ValueError: settings contradict another rank's. OSError, RuntimeError: did not come together."""
    deadline = time.monotonic() + timeout_s
    host, port = parse_address(address)
    store = _open_store(rank, size, host, port, timeout_s)
    _check_seat(store, rank, size)
    own_host = _host_facing(host, port)
    connections = _connect_peers(store, rank, size, own_host, deadline)
    try:
        process_group = _open_process_group(store, rank, size, own_host, timeout_s)
    except BaseException:
        _close_all(connections)
        raise
    return Joined(process_group, store, connections)


def parse_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"EP address {address!r}: must be host:port of rank 0")
    return host.strip("[]"), int(port)


def _open_store(rank: int, size: int, host: str, port: int, timeout_s: float) -> TCPStore:
    timeout = datetime.timedelta(seconds=timeout_s)
    if rank != 0:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    # Our own socket, because the store by itself listens on all interfaces.
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, port), family=family, backlog=max(size, 16))
    return TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _check_seat(store: Store, rank: int, size: int) -> None:
    if store.add(f"seat/{rank}", 1) > 1:
        raise ValueError(f"two processes claim EP rank {rank}")
    if rank == 0:
        store.set("nonce", secrets.token_hex(16))
        store.set("size", str(size))
    found = int(store.get("size"))
    if found != size:
        raise ValueError(f"EP rank {rank} expects a group of {size}, rank 0 one of {found}")


def _host_facing(host: str, port: int) -> str:
    """The address of the interface that this machine would use to reach host. Sends nothing."""
    family, kind, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _connect_peers(
    store: Store, rank: int, size: int, own_host: str, deadline: float
) -> dict[int, socket.socket]:
    nonce: bytes = store.get("nonce")
    connections: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in own_host else socket.AF_INET
    with contextlib.ExitStack() as on_failure, socket.create_server((own_host, 0), family=family) as listener:
        on_failure.callback(_close_all, connections)
        store.set(f"doorbell/{rank}", f"{own_host}:{listener.getsockname()[1]}")
        for peer in range(rank):
            peer_address = parse_address(store.get(f"doorbell/{peer}").decode())
            connections[peer] = socket.create_connection(peer_address, timeout=_remaining(deadline))
            connections[peer].sendall(_HELLO.pack(nonce, rank))
        while len(connections) < size - 1:
            listener.settimeout(_remaining(deadline))
            connection, _ = listener.accept()
            peer = _read_hello(connection, nonce)
            if rank < peer < size and peer not in connections:
                connections[peer] = connection
            else:
                connection.close()
        on_failure.pop_all()
    for connection in connections.values():
        _tune(connection)
    return connections


def _read_hello(connection: socket.socket, nonce: bytes) -> int:
    """The caller's rank, or -1 for a stranger."""
    connection.settimeout(_MAX_HELLO_S)
    try:
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:
        return -1
    if len(hello) < _HELLO.size:
        return -1
    found_nonce, peer = _HELLO.unpack(hello)
    return int(peer) if hmac.compare_digest(found_nonce, nonce) else -1


def _tune(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _open_process_group(
    store: Store, rank: int, size: int, own_host: str, timeout_s: float
) -> ProcessGroupGloo:
    """An object of our own, not torch's process-wide default group: two groups can live in one process."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return ProcessGroupGloo(PrefixStore("collectives", store), rank, size, options)


def _close_all(connections: dict[int, socket.socket]) -> None:
    for connection in connections.values():
        connection.close()


def _remaining(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the other ranks did not come in time")
    return remaining_s
