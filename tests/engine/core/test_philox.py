from __future__ import annotations

import numpy as np
import pytest

from engine.philox import philox4x32, uniform

# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array([counter], dtype=np.uint64), np.array([key], dtype=np.uint64))
    assert tuple(words[0].tolist()) == expected


def test_a_number_depends_on_its_seed_and_position_only() -> None:
    seeds, positions = [7, 2**64 - 1, 7], [0, 5, 2**40]
    together = uniform(seeds, positions)
    alone = [uniform([seed], [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(together.tolist())) == 3


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    num_draws, num_bins = 20_000, 50
    for numbers in (
        uniform([3] * num_draws, range(num_draws)),
        uniform(range(num_draws), [9] * num_draws),
    ):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts = np.bincount((numbers * num_bins).astype(int), minlength=num_bins)
        expected = num_draws / num_bins
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 85.4  # 0.1 % quantile for 49 degrees of freedom
