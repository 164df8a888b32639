from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.kv_layout import KvLayout
from worker.kv_rectangle import KvRectangle

LAYOUT = KvLayout(model_fingerprint="f", num_layers=9, token_shape=(4,), dtype="float32", block_size=2)
BLOCK_BYTES = LAYOUT.block_size * LAYOUT.token_bytes

rectangles = st.builds(
    lambda layer, num_layers, block, num_blocks: KvRectangle(
        layer, num_layers, block, tuple(range(100 + block, 100 + block + num_blocks))
    ),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 9),
    st.integers(1, 12),
)


def _cells(rectangle: KvRectangle) -> list[tuple[int, int, int]]:
    return [
        (layer, rectangle.first_block + i, block_id)
        for layer in range(rectangle.first_layer, rectangle.first_layer + rectangle.num_layers)
        for i, block_id in enumerate(rectangle.block_ids)
    ]


@given(rectangles, st.integers(1, 20 * BLOCK_BYTES))
def test_pieces_are_the_rectangle_and_small_enough(rectangle: KvRectangle, max_bytes: int) -> None:
    pieces = list(rectangle.pieces(LAYOUT, max_bytes))

    cells = [cell for piece in pieces for cell in _cells(piece)]
    assert sorted(cells) == sorted(_cells(rectangle))
    assert max(piece.num_bytes(LAYOUT) for piece in pieces) <= max(max_bytes, BLOCK_BYTES)


@given(rectangles, rectangles)
def test_joined_rectangle_is_both(one: KvRectangle, other: KvRectangle) -> None:
    joined = one.joined(other)

    if joined is not None:
        assert sorted(_cells(joined)) == sorted(_cells(one) + _cells(other))


@given(rectangles, st.integers(0, 25))
def test_without_leading_drops_exactly_the_held_blocks(rectangle: KvRectangle, num_held: int) -> None:
    rest = rectangle.without_leading(num_held)

    kept = [cell for cell in _cells(rectangle) if cell[1] >= num_held]
    assert (_cells(rest) if rest else []) == kept


def test_layers_and_blocks_that_touch_are_joined() -> None:
    one = KvRectangle(0, 2, 0, (7, 8))

    assert one.joined(KvRectangle(2, 1, 0, (7, 8))) == KvRectangle(0, 3, 0, (7, 8))
    assert one.joined(KvRectangle(0, 2, 2, (3,))) == KvRectangle(0, 2, 0, (7, 8, 3))
    assert one.joined(KvRectangle(0, 2, 3, (3,))) is None
