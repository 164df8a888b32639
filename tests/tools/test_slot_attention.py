from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tools.demo_model import slot_attention as module
from tools.demo_model.slot_attention import launch, slot_attention

HEADS, KV_HEADS, PLACES, DIMS = 6, 2, 80, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there: Triton's interpreter


def random_slots(positions: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(positions))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    slots = len(positions)
    cache = draw(2, slots, KV_HEADS, PLACES, DIMS)
    return (
        draw(slots, HEADS, DIMS),
        draw(slots, KV_HEADS, DIMS),
        draw(slots, KV_HEADS, DIMS),
        cache,
        torch.tensor(positions, device=DEVICE),
    )


@pytest.mark.parametrize("positions", [[0], [31, 32], [5, 0, 79, 63]])
def test_the_kernel_is_attention_over_each_slot_s_own_places(positions: list[int]) -> None:
    q, _, _, cache, position = random_slots(positions)
    ours = launch(q, cache, position)
    for slot, last in enumerate(positions):
        keys, values = cache[:, slot, :, : last + 1]
        expected = functional.scaled_dot_product_attention(q[slot][:, None], keys, values, enable_gqa=True)[
            :, 0
        ]
        torch.testing.assert_close(ours[slot], expected, atol=2e-3 if DEVICE == "cuda" else 1e-5, rtol=1e-3)


def test_the_reference_says_the_same_as_the_kernel() -> None:
    q, _, _, cache, position = random_slots([7, 40, 79])
    expected = module._reference(q, cache, position)
    torch.testing.assert_close(launch(q, cache, position), expected, atol=2e-3, rtol=1e-3)


def test_new_keys_and_values_are_seen_at_once_and_only_their_own_places_change() -> None:
    q, k, v, cache, position = random_slots([0, 9, 20])
    before = cache.clone()
    out = slot_attention(q, k, v, cache, position)
    # A slot with one place can only answer with that place's value.
    torch.testing.assert_close(out[0], v[0].repeat_interleave(HEADS // KV_HEADS, dim=0))
    for slot, place in enumerate(position.tolist()):
        assert torch.equal(cache[0, slot, :, place], k[slot])
        assert torch.equal(cache[1, slot, :, place], v[slot])
        before[:, slot, :, place] = cache[:, slot, :, place]
    assert torch.equal(before, cache)
