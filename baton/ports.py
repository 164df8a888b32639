"""Ports of this machine."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket

# Below those that Linux gives to connections and to sockets that name none: none of ours is taken before it
# is used, or while its service starts again. Each process begins somewhere else, as others look too.
_PORTS = range(10_000, 32_768)
_places = itertools.count(random.randrange(len(_PORTS)))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    ports = (_PORTS[place % len(_PORTS)] for place in _places)
    return next(port for port in ports if bind_error("127.0.0.1", port) is None)


def bind_error(host: str, port: int) -> str | None:
    """Why a server could not listen there; None when it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return "is not an address of this machine"
        except OSError as error:
            return "is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0).lower()
    return None
