"""Room for file descriptors before anybody waits for it.

The kernel doubles a process's table of descriptors when the 64th, 128th, 256th is opened, and in a process
with threads it then waits until no other core can still be reading the old one: 5 to 27 ms in which the
opening thread, an event loop with all its streams, stands still (docs/log.md).
"""

from __future__ import annotations

import fcntl
import os
import resource

_NUM_DESCRIPTORS = 16_384  # 128 KiB of kernel memory


def reserve_descriptors(num: int = _NUM_DESCRIPTORS) -> None:
    """Makes the table that large, as far as the process may have so many; the soft limit is raised for it.
    Call it once, when the service is built."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < num:
        soft = num if hard == resource.RLIM_INFINITY else min(num, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    last = num - 1 if soft == resource.RLIM_INFINITY else min(num, soft) - 1
    some = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, last))
    except OSError:
        pass  # it is in use: the table is that large
    finally:
        os.close(some)
