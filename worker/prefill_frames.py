"""The frames of the hand-off: kinds, headers, checksums. Their order is in proto/prefill.proto."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import TypeVar

import xxhash
from google.protobuf.message import DecodeError, Message

from servicekit.frames import Frame, decode_frame, encode_frame

PREFILL_SERVICE = "baton.v1.PrefillService"
PREFILL_METHOD = "Prefill"

M = TypeVar("M", bound=Message)


class FrameKind(enum.IntEnum):
    PREFILL_REQUEST = 1
    PREFILL_STARTED = 2
    KV_CHUNK = 3
    PREFILL_FINISHED = 4
    PREFILL_COMMITTED = 5


def pack_frame(kind: FrameKind, header_pb: Message, payload: bytes | bytearray | memoryview = b"") -> bytes:
    return encode_frame(kind, header_pb.SerializeToString(), payload)


def read_frame(raw: bytes) -> Frame:
    """ValueError for a frame that is cut short or of unknown kind."""
    frame = decode_frame(raw)
    FrameKind(frame.kind)
    return frame


def read_header(frame: Frame, kind: FrameKind, header_type: type[M]) -> M:
    """ValueError for another kind of frame or a header that does not parse."""
    if frame.kind != kind:
        raise ValueError(f"expected {kind.name}, got {FrameKind(frame.kind).name}")
    header_pb = header_type()
    try:
        header_pb.ParseFromString(bytes(frame.header))
    except DecodeError as error:
        raise ValueError(f"{kind.name} header does not parse: {error}") from error
    return header_pb


def checksum(payload: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload)


def combined_checksum(checksums: Sequence[int]) -> int:
    """Of the chunks' checksums, in order of sending."""
    return checksum(struct.pack(f"<{len(checksums)}Q", *checksums))
