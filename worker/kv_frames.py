"""The frames in which KV travels: kinds, headers, checksums. Their order is in prefill.proto and kv.proto."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import grpc.aio
import xxhash
from google.protobuf.message import DecodeError, Message

from servicekit.frames import Frame, decode_frame, encode_frame

PREFILL_SERVICE = "baton.v1.PrefillService"
PREFILL_METHOD = "Prefill"
KV_SERVICE = "baton.v1.KvService"
FETCH_METHOD = "Fetch"

M = TypeVar("M", bound=Message)
FrameCall = grpc.aio.StreamStreamCall[bytes, bytes]


class FrameKind(enum.IntEnum):
    PREFILL_REQUEST = 1
    PREFILL_STARTED = 2
    KV_CHUNK = 3
    PREFILL_FINISHED = 4
    PREFILL_COMMITTED = 5
    FETCH_REQUEST = 6
    FETCH_STARTED = 7
    FETCH_FINISHED = 8


def open_call(channel: grpc.aio.Channel, service: str, method: str) -> FrameCall:
    # No serializers: a frame is bytes on both sides.
    start: Any = channel.stream_stream(f"/{service}/{method}", None, None)
    call: FrameCall = start()
    return call


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


async def next_frame(call: FrameCall, last: FrameKind) -> Frame:
    """ValueError when the stream ends before its `last` kind of frame; AioRpcError when with an error."""
    raw = await call.read()
    if not isinstance(raw, bytes):
        raise ValueError(f"the stream ended before {last.name}")
    return read_frame(raw)


async def read_request(
    context: grpc.aio.ServicerContext[bytes, bytes], kind: FrameKind, request_type: type[M]
) -> M:
    """The first frame of a call. ValueError when it is something else."""
    raw = await context.read()
    if not isinstance(raw, bytes):
        raise ValueError(f"the call ended before its {kind.name}")
    return read_header(read_frame(raw), kind, request_type)


def checksum(payload: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload)


def checksum_of(pieces: Iterable[memoryview]) -> tuple[int, int]:
    """Number of bytes and checksum() of the pieces as if they lay together."""
    num_bytes, digest = 0, xxhash.xxh3_64()
    for piece in pieces:
        num_bytes += piece.nbytes
        digest.update(piece)
    return num_bytes, digest.intdigest()


def combined_checksum(checksums: Sequence[int]) -> int:
    """Of the chunks' checksums, in order of sending."""
    return checksum(struct.pack(f"<{len(checksums)}Q", *checksums))
