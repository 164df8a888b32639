"""This machine as others see it: its address, and which processes can share memory with this one."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import uuid
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

_ANY_PORT = 9  # nothing is sent to it


@cache
def host_id(
    boot_id_path: Path = Path("/proc/sys/kernel/random/boot_id"),
    pid_namespace_path: Path = Path("/proc/self/ns/pid"),
) -> str:
    """Equal only for processes that can open each other's memory files, through /proc/<pid>/fd.

    Same running kernel (boot id), same process ids (containers usually have their own) and same user (a
    process's files are private to it). Where the system does not tell, the id is random: nobody shares by
    mistake.
    """
    try:
        boot_id = boot_id_path.read_text().strip()
        namespace = pid_namespace_path.stat()
    except OSError:
        return uuid.uuid4().hex
    identity = f"{boot_id}:{namespace.st_dev}:{namespace.st_ino}:{os.geteuid()}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def reachable_host(host: str, server_url: str) -> str:
    """Under which address others reach what listens at `host`.

    For a wildcard (0.0.0.0, ::) it is the address of the interface that faces the server of `server_url`, or
    if that cannot be told, of this machine's name. Sends nothing but name look-ups.
    """
    try:
        is_wildcard = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        is_wildcard = host == ""
    if not is_wildcard:
        return host
    try:
        return _address_facing(urlsplit(server_url).hostname or "")
    except OSError:
        return socket.gethostbyname(socket.gethostname())


def _address_facing(server: str) -> str:
    if not server:
        raise OSError("no server")
    family, kind, *_, target = socket.getaddrinfo(server, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        address = str(probe.getsockname()[0])
    return f"[{address}]" if family == socket.AF_INET6 else address
