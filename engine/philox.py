"""Philox4x32-10, a counter-based random generator: the n-th number of a key without the ones before it.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11.
Constants and test vectors are those of its Random123 library. On the host, because keys and counters are host
values and a batch draws one number a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

U64 = np.ndarray[Any, np.dtype[np.uint64]]

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_NUM_ROUNDS = 10


def philox4x32(counters_N4: U64, keys_N2: U64) -> U64:
    """[N, 4] words of 32 bits, held in uint64 like the inputs."""
    even = counters_N4[:, 0::2]  # words 0 and 2: multiplied
    odd = counters_N4[:, 1::2]  # words 1 and 3: mixed in, crossed over
    key = keys_N2
    increments = np.array(_KEY_INCREMENTS, dtype=np.uint64)
    for _ in range(_NUM_ROUNDS):
        product = even * _MULTIPLIERS
        even = (product[:, ::-1] >> _32) ^ odd ^ key
        odd = product[:, ::-1] & _LOW
        key = (key + increments) & _LOW
    result = np.empty(counters_N4.shape, dtype=np.uint64)
    result[:, 0::2] = even
    result[:, 1::2] = odd
    return result


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[N] in [0, 1), 53 bits each, a function of (seed, position) alone."""
    seeds_N = np.array(seeds, dtype=np.uint64)
    positions_N = np.array(positions, dtype=np.uint64)
    counters = np.zeros((len(seeds_N), 4), dtype=np.uint64)
    counters[:, 0] = positions_N & _LOW
    counters[:, 1] = positions_N >> _32
    words = philox4x32(counters, np.stack((seeds_N & _LOW, seeds_N >> _32), axis=1))
    bits = (words[:, 0] << _32) | words[:, 1]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
