"""Device memory of one process, opened by another one of the same machine (CUDA IPC), by calls of the driver.

torch's own way counts the users of every tensor in files and keeps what a killed process has not given back.
Here a handle is bytes that the owner tells, and a mapping belongs to who opened it, until it closes it: the
memory of an owner that has died stays readable for that long. The device may be another one than the
opener's, if the two reach each other; neither has to be visible to the other process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * _HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class MemoryHandle:
    handle: bytes  # of the whole allocation
    offset_bytes: int  # of the memory in it
    device_uuid: str


def export_memory(memory: torch.Tensor) -> MemoryHandle:
    """OSError when the driver refuses, or the memory is not of one plain allocation."""
    handle = _Handle()
    with _context(memory.device) as driver:
        base, _ = _allocation(driver, memory.data_ptr())
        _call(driver, "cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(memory.data_ptr()))
    return MemoryHandle(bytes(handle.content), memory.data_ptr() - base, device_uuid(memory.device))


def device_uuid(device: torch.device) -> str:
    """Of the device itself, whatever number this process knows it by."""
    return str(torch.cuda.get_device_properties(device).uuid)


class OpenedMemory:
    """data uint8 [num_bytes] on `device`: another process's memory, to be read from here."""

    def __init__(self, exported: MemoryHandle, num_bytes: int, device: torch.device) -> None:
        """OSError when the driver refuses, or the allocation is smaller."""
        if len(exported.handle) != _HANDLE_BYTES:
            raise OSError(f"a handle of {len(exported.handle)} bytes")
        self._device = device
        self._base: int | None = None
        handle, opened = _Handle.from_buffer_copy(exported.handle), ctypes.c_uint64()
        with _context(device) as driver:
            _call(driver, "cuIpcOpenMemHandle_v2", ctypes.byref(opened), handle, _LAZY_PEER_ACCESS)
            self._base = opened.value
            try:
                _, found = _allocation(driver, opened.value)
                if exported.offset_bytes + num_bytes > found:
                    raise OSError(
                        f"an allocation of {found} bytes, expected {num_bytes} from "
                        f"{exported.offset_bytes} on"
                    )
                self.data = _bytes_at(opened.value + exported.offset_bytes, num_bytes, device)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Nothing on the device may be reading it any more. Idempotent."""
        self.data = torch.empty(0)
        base, self._base = self._base, None
        if base is not None:
            with _context(self._device) as driver:
                _call(driver, "cuIpcCloseMemHandle", ctypes.c_uint64(base))


def _bytes_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] that nobody owns. The memory may be of another device: this one reads it."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


@contextmanager
def _context(device: torch.device) -> Iterator[ctypes.CDLL]:
    """The driver, with the device's context the thread's current one."""
    with torch.cuda.device(device):
        torch.cuda.mem_get_info()  # a new thread has no context before its first call of the runtime
        yield _driver()


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _allocation(driver: ctypes.CDLL, address: int) -> tuple[int, int]:
    """Where the allocation starts that the address is in, and its bytes."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call(
        driver,
        "cuMemGetAddressRange_v2",
        ctypes.byref(base),
        ctypes.byref(size),
        ctypes.c_uint64(address),
    )
    return base.value, size.value


def _call(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    result = getattr(driver, function)(*arguments)
    if result != 0:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(result, ctypes.byref(name))
        raise OSError(f"{function}: {(name.value or b'unknown error').decode()}")
