"""Which processes can share memory with this one."""

from __future__ import annotations

import hashlib
import os
import uuid
from functools import cache
from pathlib import Path


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
