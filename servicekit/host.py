"""Which processes can share memory with this one."""

from __future__ import annotations

import hashlib
import os
import uuid
from functools import cache
from pathlib import Path


@cache
def host_id(
    boot_id_path: Path = Path("/proc/sys/kernel/random/boot_id"), shm_path: Path = Path("/dev/shm")
) -> str:
    """Equal only for processes that can open each other's POSIX shared memory objects.

    Same running kernel (boot id), same mount of /dev/shm (containers usually have one each) and same user
    (objects are private to it). Where the system does not tell, the id is random: nobody shares by mistake.
    """
    try:
        boot_id = boot_id_path.read_text().strip()
        mount = shm_path.stat()
    except OSError:
        return uuid.uuid4().hex
    identity = f"{boot_id}:{mount.st_dev}:{mount.st_ino}:{os.geteuid()}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
