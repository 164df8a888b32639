from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.frames import decode_frame, encode_frame


@given(st.integers(0, 255), st.binary(max_size=64), st.binary(max_size=256))
def test_a_frame_survives_the_wire(kind: int, header: bytes, payload: bytes) -> None:
    frame = decode_frame(encode_frame(kind, header, payload))
    assert (frame.kind, frame.header, frame.payload) == (kind, header, payload)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_is_a_payload(wrap: type) -> None:
    assert decode_frame(encode_frame(1, b"h", wrap(b"payload"))).payload == b"payload"


def test_decoding_copies_nothing() -> None:
    raw = encode_frame(1, b"header", b"payload")
    frame = decode_frame(raw)
    assert frame.payload.obj is raw
    assert frame.header.obj is raw


@given(st.binary(max_size=64), st.binary(max_size=16), st.data())
def test_a_frame_cut_inside_its_header_is_refused(header: bytes, payload: bytes, data: st.DataObject) -> None:
    raw = encode_frame(3, header, payload)
    size = data.draw(st.integers(0, 5 + len(header) - 1))
    with pytest.raises(ValueError, match="frame"):
        decode_frame(raw[:size])


@pytest.mark.parametrize("kind", [-1, 256])
def test_a_kind_that_is_not_a_byte_is_refused(kind: int) -> None:
    with pytest.raises(Exception, match="ubyte"):
        encode_frame(kind, b"")
