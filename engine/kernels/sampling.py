# ruff: noqa: PLR0913 - a kernel takes its pointers, strides and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""Drawing a token a row on the device: the rule of engine.draw, without a sort and without the host.

The vocabulary is cut into shares; one program a share finds its largest logit and its mass, one program a row
puts the shares together and looks for the token in the one share that holds it. A row that is truncated is
searched for its threshold in between, two bits of it a pass: the bits of floats order like integers.

N rows, V vocabulary, P shares of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_SHARE = 2048  # tokens
_ROW_BLOCK = 8192  # tokens that a program of a whole row reads at a time
_SPARE_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # that a float32 has beyond


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How to draw for each row, on the device. Neutral values are 1, 0, 1 and 0; temperature 0 is greedy."""

    temperature_N: torch.Tensor  # float32
    top_k_N: torch.Tensor  # int32
    top_p_N: torch.Tensor  # float32
    min_p_N: torch.Tensor  # float32
    seed_N: torch.Tensor  # int64: the 64 bits of the seed

    def rows(self, num_rows: int) -> RowSampling:
        """The first ones."""
        n = num_rows
        return RowSampling(
            self.temperature_N[:n], self.top_k_N[:n], self.top_p_N[:n], self.min_p_N[:n], self.seed_N[:n]
        )


def greedy_tokens(logits_NV: torch.Tensor, out_N: torch.Tensor) -> None:
    """int64; of equal logits the lower id."""
    values_NP, ids_NP, _ = _shares(logits_NV, None, None)
    _greedy_kernel[(logits_NV.shape[0],)](
        values_NP,
        ids_NP,
        out_N,
        logits_NV.shape[1],
        values_NP.shape[1],
        SHARES=triton.next_power_of_2(values_NP.shape[1]),
    )


def draw_tokens(
    logits_NV: torch.Tensor,
    sampling: RowSampling,
    positions_N: torch.Tensor,
    out_N: torch.Tensor,
    *,
    is_truncated: bool,
) -> None:
    """int64: what engine.draw draws for (seed, position of the new token) from the same logits. Weights are
    float32 exponentials summed in another order, so a token can differ where u of the mass lies within 1e-6
    of it from the boundary of two tokens; top_p may keep or drop the token at its edge likewise.

    is_truncated False promises that no row has top_k, top_p or min_p.
    """
    num_rows, vocab_size = logits_NV.shape
    values_NP, ids_NP, mass_NP = _shares(logits_NV, sampling.temperature_N, None)
    shares = values_NP.shape[1]
    padded = triton.next_power_of_2(shares)
    threshold_N = None
    if is_truncated:
        threshold_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
        _threshold_kernel[(num_rows,)](
            logits_NV,
            values_NP,
            sampling.temperature_N,
            sampling.top_k_N,
            sampling.top_p_N,
            sampling.min_p_N,
            threshold_N,
            logits_NV.stride(0),
            vocab_size,
            shares,
            SHARES=padded,
            SHIFT=_SPARE_BITS[logits_NV.dtype],
            BLOCK=_ROW_BLOCK,
            num_warps=32,
        )
        _, _, mass_NP = _shares(logits_NV, sampling.temperature_N, threshold_N)
    _draw_kernel[(num_rows,)](
        logits_NV,
        values_NP,
        ids_NP,
        mass_NP,
        sampling.temperature_N,
        sampling.seed_N,
        positions_N,
        threshold_N,
        out_N,
        logits_NV.stride(0),
        vocab_size,
        shares,
        SHARES=padded,
        SHARE=_SHARE,
        HAS_THRESHOLD=is_truncated,
        num_warps=8,
    )


def _shares(
    logits_NV: torch.Tensor, temperature_N: torch.Tensor | None, threshold_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[N, P]: largest logit, its id (the lowest of equals), and with temperatures the mass of what is at or
    above the threshold, relative to the largest."""
    num_rows, vocab_size = logits_NV.shape
    shares = triton.cdiv(vocab_size, _SHARE)
    device = logits_NV.device
    values_NP = torch.empty(num_rows, shares, dtype=torch.float32, device=device)
    ids_NP = torch.empty(num_rows, shares, dtype=torch.int32, device=device)
    mass_NP = None
    if temperature_N is not None:
        mass_NP = torch.empty(num_rows, shares, dtype=torch.float32, device=device)
    _share_kernel[(num_rows, shares)](
        logits_NV,
        temperature_N,
        threshold_N,
        values_NP,
        ids_NP,
        mass_NP,
        logits_NV.stride(0),
        vocab_size,
        SHARE=_SHARE,
        HAS_MASS=mass_NP is not None,
        HAS_THRESHOLD=threshold_N is not None,
        num_warps=8,
    )
    return values_NP, ids_NP, mass_NP


@triton.jit
def _weights(logits, largest, temperature):
    """exp((logit - largest) / temperature); a share without any finite logit weighs nothing."""
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp((logits - finite) / temperature)


@triton.jit
def _share_kernel(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,
    values_ptr,
    ids_ptr,
    mass_ptr,
    stride,
    vocab_size,
    SHARE: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    place = row * tl.num_programs(1) + share
    ids = share * SHARE + tl.arange(0, SHARE)
    logits = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
    logits = logits.to(tl.float32)
    largest = tl.max(logits, 0)
    tl.store(values_ptr + place, largest)
    tl.store(ids_ptr + place, tl.min(tl.where(logits == largest, ids, vocab_size), 0))
    if HAS_MASS:
        temperature = tl.load(temperature_ptr + row)
        temperature = tl.where(temperature > 0.0, temperature, 1.0)
        weights = _weights(logits, largest, temperature)
        if HAS_THRESHOLD:
            weights = tl.where(logits >= tl.load(threshold_ptr + row), weights, 0.0)
        tl.store(mass_ptr + place, tl.sum(weights, 0))


@triton.jit
def _likeliest(values, ids, vocab_size):
    """The id of the largest value; of equals the lowest. A token even where a logit is NaN."""
    found = tl.min(tl.where(values == tl.max(values, 0), ids, vocab_size), 0)
    return tl.minimum(found, vocab_size - 1).to(tl.int64)


@triton.jit
def _greedy_kernel(values_ptr, ids_ptr, out_ptr, vocab_size, num_shares, SHARES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    shares = tl.arange(0, SHARES)
    is_share = shares < num_shares
    values = tl.load(values_ptr + row * num_shares + shares, mask=is_share, other=float("-inf"))
    ids = tl.load(ids_ptr + row * num_shares + shares, mask=is_share, other=0)
    tl.store(out_ptr + row, _likeliest(values, ids, vocab_size))


@triton.jit
def _uniform(seed, position):
    """float64 in [0, 1): engine.philox.uniform."""
    counter = position.to(tl.uint64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, _, _ = tl.philox(seed.to(tl.uint64), low, high, zero, zero)
    bits = (word0.to(tl.uint64) << 32) | word1.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def _draw_kernel(
    logits_ptr,
    values_ptr,
    ids_ptr,
    mass_ptr,
    temperature_ptr,
    seed_ptr,
    positions_ptr,
    threshold_ptr,
    out_ptr,
    stride,
    vocab_size,
    num_shares,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    shares = tl.arange(0, SHARES)
    is_share = shares < num_shares
    values = tl.load(values_ptr + row * num_shares + shares, mask=is_share, other=float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0.0:
        likeliest_ids = tl.load(ids_ptr + row * num_shares + shares, mask=is_share, other=0)
        tl.store(out_ptr + row, _likeliest(values, likeliest_ids, vocab_size))
    else:
        mass = tl.load(mass_ptr + row * num_shares + shares, mask=is_share, other=0.0).to(tl.float64)
        mass = mass * _weights(values, tl.max(values, 0), temperature).to(tl.float64)
        cumulated = tl.cumsum(mass, 0)
        u = _uniform(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        whole = tl.max(cumulated, 0)
        target = u * whole
        # The first share above the target; where rounding has made that the whole, the last with any mass.
        last = tl.sum((cumulated < whole).to(tl.int32), 0)
        share = tl.minimum(tl.sum((cumulated <= target).to(tl.int32), 0), last)
        is_mine = shares == share
        before = tl.sum(tl.where(is_mine, cumulated - mass, 0.0), 0)
        inside = (target - before) / tl.sum(tl.where(is_mine, mass, 0.0), 0)

        places = tl.arange(0, SHARE)
        ids = share * SHARE + places
        logits = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
        logits = logits.to(tl.float32)
        weights = _weights(logits, tl.max(logits, 0), temperature)
        if HAS_THRESHOLD:
            weights = tl.where(logits >= tl.load(threshold_ptr + row), weights, 0.0)
        cumulated_in = tl.cumsum(weights.to(tl.float64), 0)
        whole_in = tl.max(cumulated_in, 0)
        last_in = tl.sum((cumulated_in < whole_in).to(tl.int32), 0)
        place = tl.minimum(tl.sum((cumulated_in <= inside * whole_in).to(tl.int32), 0), last_in)
        tl.store(out_ptr + row, (share * SHARE + place).to(tl.int64))


@triton.jit
def _order_key(x, SHIFT: tl.constexpr):
    """uint32 that orders like the float; SHIFT drops the bits that a shorter float does not have."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000) >> SHIFT


@triton.jit
def _float_of(key, SHIFT: tl.constexpr):
    whole = key << SHIFT
    bits = tl.where(whole >> 31 != 0, whole & 0x7FFFFFFF, ~(whole | ((1 << SHIFT) - 1)))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _above(
    row_ptr,
    key1,
    key2,
    key3,
    floor_key,
    largest,
    temperature,
    vocab_size,
    COUNTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float64 mass, or number, of the row's logits above each key that are not below `floor_key`."""
    places = tl.arange(0, BLOCK)
    sum1 = tl.zeros((BLOCK,), tl.float32)
    sum2 = tl.zeros((BLOCK,), tl.float32)
    sum3 = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        ids = first + places
        logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        keys = _order_key(logits, SHIFT)
        weights = tl.full((BLOCK,), 1.0, tl.float32)
        if not COUNTS:
            weights = _weights(logits, largest, temperature)
        weights = tl.where((keys >= floor_key) & (ids < vocab_size), weights, 0.0)
        sum1 += tl.where(keys > key1, weights, 0.0)
        sum2 += tl.where(keys > key2, weights, 0.0)
        sum3 += tl.where(keys > key3, weights, 0.0)
    return tl.sum(sum1.to(tl.float64), 0), tl.sum(sum2.to(tl.float64), 0), tl.sum(sum3.to(tl.float64), 0)


@triton.jit
def _smallest_key(
    row_ptr,
    limit,
    floor_key,
    largest,
    temperature,
    vocab_size,
    COUNTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest key from floor_key on that has less than `limit` above it: two bits a pass."""
    low = floor_key
    high = _order_key(largest, SHIFT)
    while low < high:
        step = (high - low) >> 2
        key1 = low + step
        key2 = key1 + step
        key3 = key2 + step
        sum1, sum2, sum3 = _above(
            row_ptr, key1, key2, key3, floor_key, largest, temperature, vocab_size, COUNTS, SHIFT, BLOCK
        )
        low = tl.where(
            sum1 < limit, low, tl.where(sum2 < limit, key1, tl.where(sum3 < limit, key2, key3)) + 1
        )
        high = tl.where(sum1 < limit, key1, tl.where(sum2 < limit, key2, tl.where(sum3 < limit, key3, high)))
    return high


@triton.jit
def _threshold_kernel(
    logits_ptr,
    values_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_ptr,
    stride,
    vocab_size,
    num_shares,
    SHARES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest logit of the row that may be drawn: top_k, then top_p of what that left, then min_p."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    shares = tl.arange(0, SHARES)
    values = tl.load(values_ptr + row * num_shares + shares, mask=shares < num_shares, other=float("-inf"))
    largest = tl.max(values, 0)
    threshold = tl.full((), float("-inf"), tl.float32)
    row_ptr = logits_ptr + row * stride
    if temperature > 0.0:
        zero_key = (vocab_size * 0).to(tl.uint32)
        floor_key = zero_key
        lost = tl.full((), 0.0, tl.float64)
        if (top_k > 0) & (top_k < vocab_size):
            # The k-th largest is the smallest key that fewer than k keys are above.
            floor_key = _smallest_key(
                row_ptr, top_k, zero_key, largest, temperature, vocab_size, True, SHIFT, BLOCK
            )
            threshold = _float_of(floor_key, SHIFT)
            below = floor_key - 1
            number, _, _ = _above(
                row_ptr, below, below, below, zero_key, largest, temperature, vocab_size, True, SHIFT, BLOCK
            )
            # Of logits that tie at the k-th place the mass counts those up to k.
            weight = _weights(threshold, largest, temperature).to(tl.float64)
            lost = (number - tl.minimum(number, top_k.to(tl.float64))) * weight
        if top_p < 1.0:
            whole, _, _ = _above(
                row_ptr,
                zero_key,
                zero_key,
                zero_key,
                floor_key,
                largest,
                temperature,
                vocab_size,
                False,
                SHIFT,
                BLOCK,
            )
            limit = top_p.to(tl.float64) * (whole - lost)
            key = _smallest_key(
                row_ptr, limit, floor_key, largest, temperature, vocab_size, False, SHIFT, BLOCK
            )
            threshold = tl.maximum(threshold, _float_of(key, SHIFT))
        if min_p > 0.0:
            threshold = tl.maximum(threshold, largest + temperature * tl.log(min_p))
    tl.store(out_ptr + row, threshold)
