"""The blocks themselves: one tensor for all layers, readable and writable as rectangles of bytes.

A shared cache lives in an anonymous memory file of its owner (memfd_create). Another process of the host
opens it through the owner's file descriptor, read-only. Nothing has a path, so nothing is left behind however
a process ends, and the size of /dev/shm (64 MiB in a container) does not matter. The owner's memory lives as
long as somebody maps it.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.block_runs import runs
from engine.cuda_ipc import MemoryHandle, OpenedMemory, export_memory
from engine.device_reads import DeviceReads
from engine.device_writes import DeviceWrites
from engine.kv_export import STAMP_BYTES, KvExport
from engine.kv_layout import KvLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.uint8,
}


class KvCache:
    """data [num_layers, num_blocks, block_size, *token_shape], zeroed: what was never written is finite.

    Not synchronised: who reads or writes a block must own it (a sequence, a reservation).
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        device: str = "cpu",
        is_shared: bool = False,
        is_pinned: bool = False,
    ) -> None:
        """is_shared is a wish: without memfd (not Linux) or off the CPU shared_name stays None. is_pinned: in
        memory that CUDA copies from and to by itself."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.shared_name: str | None = None
        self.exported: KvExport | None = None  # set by export()
        self.export_refusal = ""  # why it could not be
        self._stamp: torch.Tensor | None = None  # uint8 [STAMP_BYTES] behind the blocks, on CUDA
        self._file: int | None = None
        self._map: mmap.mmap | None = None
        shape = (layout.num_layers, num_blocks, layout.block_size, *layout.token_shape)
        dtype = TORCH_DTYPES[layout.dtype]
        if is_shared and device == "cpu" and hasattr(os, "memfd_create"):
            self._create_file()
            assert self._map is not None
            self.data: torch.Tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)
        elif torch.device(device).type == "cuda":
            num_stamps = STAMP_BYTES // dtype.itemsize
            flat = torch.zeros(math.prod(shape) + num_stamps, dtype=dtype, device=device)
            self.data = flat[:-num_stamps].view(shape)
            self._stamp = flat[-num_stamps:].view(torch.uint8)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device, pin_memory=is_pinned)
        self._rows = [layer.view(-1, *layout.token_shape) for layer in self.data.unbind()]
        self._bytes_LBX = self._byte_view() if device == "cpu" else None
        is_cuda = self.data.device.type == "cuda"
        self._device_reads = DeviceReads(self.data) if is_cuda else None
        self._device_writes = DeviceWrites(self.data) if is_cuda else None

    @classmethod
    def attach(cls, name: str, layout: KvLayout, num_blocks: int) -> AttachedKvCache:
        """The read side of another process's shared cache. OSError when it is gone or not of this size."""
        return AttachedKvCache(name, layout, num_blocks)

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes

    @property
    def is_on_device(self) -> bool:
        """Then who reads or writes blocks may have to wait for forward passes."""
        return self._device_writes is not None

    def layer(self, i: int) -> torch.Tensor:
        """[num_blocks, block_size, *token_shape], a view."""
        return self.data[i]

    def write_rows(self, layer: int, slot_mapping_T: torch.Tensor, rows: torch.Tensor) -> None:
        """rows [T, *token_shape] go to their slots."""
        self._rows[layer].index_copy_(0, slot_mapping_T, rows)

    def fence(self) -> torch.cuda.Event | None:
        """On the engine thread, when blocks are given to somebody who writes them from outside: these writes
        go behind what was launched so far. None on the CPU, where nothing is under way between steps."""
        return None if self._device_writes is None else self._device_writes.fence()

    def views(self, first_layer: int, num_layers: int, block_ids: list[int]) -> Iterator[memoryview]:
        """What read_blocks() would copy, piece by piece where it lies. On the CPU only."""
        assert self._bytes_LBX is not None, "a cache on a device, or closed"
        return piecewise(self._bytes_LBX[first_layer : first_layer + num_layers], block_ids)

    def read_blocks(
        self, first_layer: int, num_layers: int, block_ids: list[int], into: memoryview | None = None
    ) -> memoryview:
        """A copy of the bytes, [layer][block][token in block][token_shape]; it may lie in `into`, when that
        is just as large. On CUDA behind all that was launched so far."""
        layers = slice(first_layer, first_layer + num_layers)
        if self._device_reads is not None:
            return self._device_reads.read(layers, block_ids)
        assert self._bytes_LBX is not None, "closed"
        return gather(self._bytes_LBX[layers], block_ids, into)

    def write_blocks(
        self,
        first_layer: int,
        num_layers: int,
        block_ids: list[int],
        payload: memoryview | bytes,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """The reverse of read_blocks. ValueError when the payload has not exactly that size. On CUDA behind
        `after`, a fence(), or without one behind all that was launched so far; never on the stream of the
        forward passes."""
        layers = slice(first_layer, first_layer + num_layers)
        expected = num_layers * len(block_ids) * self._layer_block_bytes
        if memoryview(payload).nbytes != expected:
            raise ValueError(
                f"{num_layers} layers of {len(block_ids)} blocks are {expected} bytes, "
                f"got {memoryview(payload).nbytes}"
            )
        if self._device_writes is not None:
            self._device_writes.write(layers, block_ids, payload, after)
            return
        assert self._bytes_LBX is not None, "closed"
        source = np.frombuffer(payload, dtype=np.uint8).reshape(num_layers, len(block_ids), -1)
        target = self._bytes_LBX[layers]
        for start, first_id, length in runs(block_ids):
            target[:, first_id : first_id + length] = source[:, start : start + length]

    def export(self) -> None:
        """Another process of this machine may open_peer() the cache from now on, as `exported` says, if the
        driver lets it. It must read only what somebody tells it is there."""
        name = secrets.token_hex(STAMP_BYTES)
        try:
            if self._stamp is not None:
                self._stamp.copy_(torch.frombuffer(bytearray.fromhex(name), dtype=torch.uint8))
                memory = export_memory(self.data)
            elif self.shared_name is not None:
                memory = MemoryHandle(self.shared_name.encode(), 0, "")
            else:
                raise OSError("it is in private memory")
        except (OSError, RuntimeError) as error:
            self.export_refusal = str(error)
            return
        self.exported = KvExport(name=name, pid=os.getpid(), num_blocks=self.num_blocks, memory=memory)

    def open_peer(self, exported: KvExport) -> PeerKvCache:
        """Another process's cache of this layout, to copy_blocks() from. OSError when it is gone, or cannot
        be read from where this one is."""
        if self.is_on_device != bool(exported.memory.device_uuid):
            raise OSError("one of the two caches is on a device, the other one is not")
        if self.is_on_device:
            return OpenedKvCache(exported, self.layout, self.data.device)
        return AttachedKvCache(exported.memory.handle.decode(), self.layout, exported.num_blocks)

    def copy_blocks(
        self,
        source: KvCache | PeerKvCache,
        first_layer: int,
        num_layers: int,
        source_ids: list[int],
        block_ids: list[int],
        after: torch.cuda.Event | None = None,
    ) -> None:
        """As write_blocks() of what is in these blocks of the other cache, without a detour."""
        if isinstance(source, OpenedKvCache):
            assert self._device_writes is not None
            layers = slice(first_layer, first_layer + num_layers)
            self._device_writes.copy(layers, block_ids, source.data, source_ids, after)
        else:
            payload = source.read_blocks(first_layer, num_layers, source_ids)
            self.write_blocks(first_layer, num_layers, block_ids, payload, after)

    @contextmanager
    def landing(self, num_bytes: int) -> Iterator[memoryview | None]:
        """On CUDA, memory from which write_blocks() copies without a detour, inside the block."""
        if self._device_writes is None:
            yield None
            return
        with self._device_writes.landing(num_bytes) as memory:
            yield memory

    def close(self) -> None:
        """Give the memory back; tensors of this cache must not be used afterwards. Idempotent."""
        self._bytes_LBX = None
        self._rows = []
        self._device_reads = self._device_writes = None
        self.exported = self._stamp = None
        self.data = torch.empty(0)
        close_map(self._map)
        self._map = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.shared_name = None

    @property
    def _layer_block_bytes(self) -> int:
        return self.layout.block_size * self.layout.token_bytes

    def _create_file(self) -> None:
        token = secrets.token_hex(8)
        self._file = os.memfd_create(f"baton-kv-{token}", os.MFD_CLOEXEC)
        os.ftruncate(self._file, self.size_bytes)
        self._map = mmap.mmap(self._file, self.size_bytes)
        self.shared_name = f"{os.getpid()}.{self._file}.{token}"

    def _byte_view(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        flat = self.data.view(self.layout.num_layers, self.num_blocks, -1)
        view: np.ndarray[Any, np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
        return view


class AttachedKvCache:
    """Another process's shared cache, read-only. It stays readable after the owner's death, until close()."""

    def __init__(self, name: str, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        size_bytes = num_blocks * layout.block_bytes
        file = _open_shared(name)
        try:
            found = os.fstat(file).st_size
            if found != size_bytes:
                raise OSError(f"shared KV cache {name} has {found} bytes, expected {size_bytes}")
            self._map: mmap.mmap | None = mmap.mmap(file, size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        flat = np.frombuffer(self._map, dtype=np.uint8)
        self._bytes_LBX: np.ndarray[Any, np.dtype[np.uint8]] | None = flat.reshape(
            layout.num_layers, num_blocks, -1
        )

    def views(self, first_layer: int, num_layers: int, block_ids: list[int]) -> Iterator[memoryview]:
        """As KvCache.views."""
        assert self._bytes_LBX is not None, "closed"
        return piecewise(self._bytes_LBX[first_layer : first_layer + num_layers], block_ids)

    def read_blocks(
        self, first_layer: int, num_layers: int, block_ids: list[int], into: memoryview | None = None
    ) -> memoryview:
        """As KvCache.read_blocks; the copy lies in `into`, when it is given and just as large."""
        assert self._bytes_LBX is not None, "closed"
        return gather(self._bytes_LBX[first_layer : first_layer + num_layers], block_ids, into)

    def close(self) -> None:
        self._bytes_LBX = None
        close_map(self._map)
        self._map = None


class OpenedKvCache:
    """Another process's cache on a device, read-only. It stays readable after the owner's death, until
    close(), and its memory stays taken for as long."""

    def __init__(self, exported: KvExport, layout: KvLayout, device: torch.device) -> None:
        """`device` is who reads it. OSError when it is gone, or cannot be read."""
        self.layout = layout
        self.num_blocks = exported.num_blocks
        num_bytes = exported.num_blocks * layout.block_bytes
        self._memory = OpenedMemory(exported.memory, num_bytes + STAMP_BYTES, device)
        try:
            self._check(bytes.fromhex(exported.name), num_bytes)
        except BaseException:
            self._memory.close()
            raise
        blocks = self._memory.data[:num_bytes].view(TORCH_DTYPES[layout.dtype])
        # [layers, blocks, block_size, *token_shape]
        self.data = blocks.view(layout.num_layers, self.num_blocks, layout.block_size, *layout.token_shape)

    def close(self) -> None:
        self.data = torch.empty(0)
        self._memory.close()

    def _check(self, stamp: bytes, num_bytes: int) -> None:
        """Some machines open the memory of another device and then read anything but what is there."""
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._memory.data.device)):
                found = self._memory.data[num_bytes:].cpu()
        except RuntimeError as error:
            raise OSError(f"it cannot be read: {error}") from error
        if bytes(found.tolist()) != stamp:
            raise OSError("what was opened is not that cache")


PeerKvCache = AttachedKvCache | OpenedKvCache


def gather(
    source: np.ndarray[Any, np.dtype[np.uint8]], block_ids: list[int], into: memoryview | None = None
) -> memoryview:
    """Blocks of [layers, blocks, bytes], contiguous."""
    shape = (source.shape[0], len(block_ids), source.shape[2])
    if into is not None and into.nbytes == math.prod(shape):
        picked = np.frombuffer(into, dtype=np.uint8).reshape(shape)
    else:
        picked = np.empty(shape, dtype=np.uint8)
    for start, first_id, length in runs(block_ids):
        picked[:, start : start + length] = source[:, first_id : first_id + length]
    return picked.reshape(-1).data


def piecewise(source: np.ndarray[Any, np.dtype[np.uint8]], block_ids: list[int]) -> Iterator[memoryview]:
    """The same bytes in the same order, without a copy."""
    for layer in source:
        for _, first_id, length in runs(block_ids):
            yield layer[first_id : first_id + length].reshape(-1).data


def close_map(mapping: mmap.mmap | None) -> None:
    if mapping is not None:
        try:
            mapping.close()
        except BufferError:
            pass  # a view is still alive: the memory goes with it


def _open_shared(name: str) -> int:
    try:
        pid, file, token = name.split(".")
        path = Path("/proc") / str(int(pid)) / "fd" / str(int(file))
    except ValueError:
        raise OSError(f"not the name of a shared KV cache: {name!r}") from None
    # The process id or descriptor may have been given to something else since: the token tells.
    if token not in os.readlink(path):
        raise FileNotFoundError(f"shared KV cache {name} is gone")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
