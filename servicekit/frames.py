"""Raw gRPC messages: kind, header, payload.

    kind: u8 | header length: u32 little-endian | header | payload

A payload of a MiB inside protobuf is copied several times; outside it is copied once on each side.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_PREFIX = struct.Struct("<BI")


class Frame(NamedTuple):
    kind: int
    header: memoryview
    payload: memoryview


def encode_frame(kind: int, header: bytes, payload: bytes | bytearray | memoryview = b"") -> bytes:
    return b"".join((_PREFIX.pack(kind, len(header)), header, payload))


def decode_frame(raw: bytes) -> Frame:
    """Views into `raw`, no copy. ValueError when it is cut short."""
    if len(raw) < _PREFIX.size:
        raise ValueError(f"a frame has at least {_PREFIX.size} bytes, got {len(raw)}")
    kind, header_bytes = _PREFIX.unpack_from(raw)
    end = _PREFIX.size + header_bytes
    if end > len(raw):
        raise ValueError(f"frame of {len(raw)} bytes announces a header that ends at byte {end}")
    view = memoryview(raw)
    return Frame(kind, view[_PREFIX.size : end], view[end:])
