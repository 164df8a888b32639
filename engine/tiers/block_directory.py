"""One directory of block files: the bytes of a block and a checksum each.

A file is written under another name and renamed, so after the death of the process it is whole or not there.
Nothing is synced: what a power cut leaves half written has the wrong size or checksum, and is removed. The
name says what a file holds, and the checksum covers the name.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from engine.kv_layout import KvLayout
from engine.tiers.block_key import BlockKey
from kvstore.block_hash import BlockHash

_CHECKSUM_BYTES = 8
_LOCK, _SUFFIX, _UNFINISHED = "lock", ".kv", ".part"
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-(\d+)-([0-9a-f]{16})\.kv")


class BlockDamaged(ValueError):
    """A file is not what was written."""


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A block of another model or layout."""

    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was there when the directory was opened, the oldest first."""

    keys: list[BlockKey]
    others: list[OtherFile]


class BlockDirectory:
    """Stateless but for the lock: any thread may write and read, but one file is one thread's at a time."""

    def __init__(self, path: Path, layout: KvLayout) -> None:
        """ValueError, one line, when it cannot be used, or another process uses it."""
        self.path = path
        self.block_bytes = layout.block_bytes
        self.file_bytes = layout.block_bytes + _CHECKSUM_BYTES
        self._fingerprint = layout.fingerprint
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(f"cannot keep KV blocks in {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ValueError(f"another process keeps its KV blocks in {path}; give each its own") from error

    def scan(self) -> Found:
        """Removes what is damaged. Other files are left alone."""
        keys: list[tuple[int, BlockKey]] = []
        others: list[tuple[int, OtherFile]] = []
        for entry in os.scandir(self.path):
            if entry.name.endswith(_UNFINISHED):
                os.unlink(entry.path)
            elif match := _NAME.fullmatch(entry.name):
                status = entry.stat()
                if match[4] != self._fingerprint:
                    others.append((status.st_mtime_ns, OtherFile(Path(entry.path), status.st_size)))
                elif status.st_size == self.file_bytes:
                    keys.append((status.st_mtime_ns, _key(match)))
                else:
                    os.unlink(entry.path)
        keys.sort(key=lambda item: item[0])
        others.sort(key=lambda item: item[0])
        return Found([key for _, key in keys], [other for _, other in others])

    def path_of(self, key: BlockKey) -> Path:
        parts = (key.block_hash.hex(), key.parent.hex(), str(key.depth), self._fingerprint)
        return self.path / ("-".join(parts) + _SUFFIX)

    def write(self, key: BlockKey, kv_bytes: memoryview) -> None:
        """OSError when there is no room, with nothing left behind."""
        target = self.path_of(key)
        unfinished = target.with_suffix(_UNFINISHED)
        try:
            with open(unfinished, "wb", buffering=0) as file:
                for part in (kv_bytes, _checksum(target.name, kv_bytes)):
                    rest = memoryview(part)
                    while rest:
                        rest = rest[file.write(rest) :]
            os.rename(unfinished, target)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, key: BlockKey) -> memoryview:
        """[layer][token in block][token_shape]. Raises OSError, and BlockDamaged."""
        path = self.path_of(key)
        contents = np.empty(self.file_bytes + 1, dtype=np.uint8)
        with open(path, "rb", buffering=0) as file:
            num_bytes = 0
            while size := file.readinto(contents[num_bytes:].data):
                num_bytes += size
        if num_bytes != self.file_bytes:
            raise BlockDamaged(f"block file has {num_bytes} bytes, expected {self.file_bytes}")
        kv_bytes = contents[: self.block_bytes].data
        if _checksum(path.name, kv_bytes) != contents[self.block_bytes : num_bytes].tobytes():
            raise BlockDamaged("block file does not match its checksum")
        return kv_bytes

    def close(self) -> None:
        """Let another process have the directory. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _key(match: re.Match[str]) -> BlockKey:
    return BlockKey(BlockHash(bytes.fromhex(match[1])), BlockHash(bytes.fromhex(match[2])), int(match[3]))


def _checksum(name: str, kv_bytes: memoryview) -> bytes:
    hasher = xxhash.xxh3_64(name.encode())
    hasher.update(kv_bytes)
    digest: bytes = hasher.digest()
    return digest
