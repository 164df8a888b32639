"""Triton attention against the row-by-row reference in float64."""

from __future__ import annotations

import pytest
import torch

from engine.attention.reference import mla_reference
from engine.forward_batch import ForwardBatch

pytest.importorskip("triton", reason="kernel tests need the package triton (pip install triton)")

from engine.kernels.attention_context import ExpandTuning, expand_context
from engine.kernels.attention_decode import DecodeTuning, mla_decode, num_shares
from engine.kernels.attention_prefill import PrefillTuning, Segments, max_shares, mla_prefill
from engine.kernels.mla_rows import prepare_mla_rows
from engine.kernels.row_task import RowTask
from engine.layers.rms_norm import RmsNorm
from engine.layers.rotary import rotate_
from tests.engine.kernels.kernel_batches import padded_tables, scattered_batch

RANK, ROPE, NOPE, VALUE = 32, 16, 16, 32


def expansion(num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.randn(num_heads, NOPE, RANK) / RANK**0.5
    value = torch.randn(num_heads, RANK, VALUE) / RANK**0.5
    return key, value


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("num_heads", [3, 20])
def test_decode_attends_to_the_whole_context(device: str, num_heads: int, shares: int) -> None:
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([1, 70, 33, 5], [], 8)
    cache = torch.randn(num_blocks, 8, RANK + ROPE)
    q = torch.randn(4, num_heads, NOPE + ROPE) / 2
    key, value = expansion(num_heads)
    absorbed = torch.cat((torch.einsum("shn,hnc->shc", q[..., :NOPE], key), q[..., NOPE:]), dim=-1)

    latent = mla_decode(
        absorbed.to(device),
        cache.to(device),
        padded_tables(batch).to(device),
        torch.tensor(batch.context_len, dtype=torch.int32, device=device),
        RANK,
        shares=shares,
        tuning=DecodeTuning(num_rows=16),
    )

    found = torch.einsum("shc,hcv->shv", latent.cpu(), value).double()
    expected = mla_reference(q, batch, cache, key, value)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shares", [1, 3])
def test_an_empty_context_gives_zeros(device: str, shares: int) -> None:
    """Padded rows of a captured graph have none."""
    q = torch.randn(2, 4, RANK + ROPE, device=device)
    cache = torch.randn(4, 8, RANK + ROPE, device=device)
    tables = torch.zeros(2, 4, dtype=torch.int32, device=device)
    lengths = torch.tensor([0, 9], dtype=torch.int32, device=device)

    found = mla_decode(q, cache, tables, lengths, RANK, shares=shares)

    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[1].abs().sum() > 0


def test_few_sequences_share_their_contexts_out() -> None:
    assert num_shares(1, 16) == 32
    assert num_shares(128, 16) == 2
    assert num_shares(512, 16) == 1


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)])
def test_prefill_is_causal_over_cached_and_new_rows(device: str, tile: tuple[int, int]) -> None:
    torch.manual_seed(0)
    num_heads = 3
    batch, num_blocks = scattered_batch([], [(0, 50), (37, 20), (64, 1), (16, 33)], 8)
    cache = torch.randn(num_blocks, 8, RANK + ROPE)
    q = torch.randn(batch.num_tokens, num_heads, NOPE + ROPE) / 2
    key, value = expansion(num_heads)
    rows = torch.cat(
        [
            cache[table].flatten(0, 1)[:length]
            for table, length in zip(batch.block_tables, batch.context_len, strict=True)
        ]
    )
    latent = rows[:, :RANK]
    key_value = torch.cat(
        (torch.einsum("lc,hnc->lhn", latent, key), torch.einsum("lc,hcv->lhv", latent, value)), dim=-1
    )
    context_start = torch.tensor([0, *batch.context_len]).cumsum(0).to(torch.int32)
    query_start = torch.tensor(batch.query_start, dtype=torch.int32)
    segments = Segments(query_start.to(device), context_start.to(device))

    found = mla_prefill(
        q.to(device),
        key_value.to(device),
        rows[:, RANK:].to(device),
        segments,
        PrefillTuning(num_queries=tile[0], num_keys=tile[1], num_warps=4, num_stages=1),
    )

    expected = mla_reference(q, batch, cache, key, value)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)


CHUNKS = [(0, 9), (37, 20), (0, 0), (64, 1), (16, 33), (3, 2)]  # cached, new; two end inside a block


def chunks_before(
    batch: ForwardBatch, num_places: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts of the rows and of the cached rows, block tables; with places of chunks that are not there."""
    starts = torch.tensor(batch.query_start)
    cached = torch.tensor(batch.context_len) - starts.diff()
    missing = num_places - batch.num_seqs
    query_start = torch.cat((starts, starts[-1:].expand(missing))).to(torch.int32)
    cached_start = torch.cat((torch.zeros(1), cached.cumsum(0), cached.sum().expand(missing))).to(torch.int32)
    tables = torch.zeros(num_places, 16, dtype=torch.int32)
    padded = padded_tables(batch)
    tables[: batch.num_seqs, : padded.shape[1]] = padded
    return query_start.to(device), cached_start.to(device), tables.to(device)


@pytest.mark.parametrize(("num_queries", "shares"), [(16, 1), (16, 3), (32, None)])
def test_chunks_attend_to_what_the_cache_held_before_them(
    device: str, num_queries: int, shares: int | None
) -> None:
    torch.manual_seed(0)
    num_heads, num_padding = 3, 5
    batch, num_blocks = scattered_batch([], CHUNKS, 8)
    cache = torch.randn(num_blocks, 8, RANK + ROPE)
    q = torch.randn(batch.num_tokens + num_padding, num_heads, NOPE + ROPE) / 2
    key, value = expansion(num_heads)
    expansion_KC = torch.cat((key, value.transpose(1, 2)), dim=1).flatten(0, 1)
    new_rows = torch.cat((cache.flatten(0, 1)[batch.slot_mapping_T], torch.randn(num_padding, RANK + ROPE)))
    query_start, cached_start, tables = chunks_before(batch, len(CHUNKS) + 2, device)

    cached = expand_context(cache.to(device), tables, cached_start, expansion_KC.to(device), num_heads, 200)
    found = mla_prefill(
        q.to(device),
        (new_rows[:, :RANK] @ expansion_KC.T).unflatten(-1, (num_heads, -1)).to(device),
        new_rows[:, RANK:].to(device),
        Segments(query_start, query_start),
        PrefillTuning(num_queries=num_queries, num_keys=16, num_warps=4, num_stages=1),
        cached=cached,
        shares=shares,
    ).cpu()

    expected = mla_reference(q[: batch.num_tokens], batch, cache, key, value)
    torch.testing.assert_close(found[: batch.num_tokens].double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[batch.num_tokens :].any()


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]
)
def test_cached_rows_are_expanded_in_order(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_heads = 3
    batch, num_blocks = scattered_batch([], CHUNKS, 8)
    cache = torch.randn(num_blocks, 8, RANK + ROPE).to(dtype)
    expansion_KC = torch.randn(num_heads * (NOPE + VALUE), RANK).to(dtype)
    _, cached_start, tables = chunks_before(batch, len(CHUNKS) + 2, device)
    tuning = ExpandTuning(num_rows=16, num_columns=64, depth=16, num_warps=4, num_stages=1, num_programs=4)

    found = expand_context(
        cache.to(device), tables, cached_start, expansion_KC.to(device), num_heads, 200, tuning
    )

    rows = torch.cat(
        [cache[table].flatten(0, 1)[:num] for table, (num, _) in zip(batch.block_tables, CHUNKS, strict=True)]
    )
    expected = (rows[:, :RANK].double() @ expansion_KC.double().T).unflatten(-1, (num_heads, -1))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.key_value_LHK[: len(rows)].cpu().double(), expected, **tolerance)
    assert torch.equal(found.rope_LR[: len(rows)].cpu(), rows[:, RANK:])


def test_a_graph_of_few_rows_shares_long_contexts_out() -> None:
    assert max_shares(64) == 8
    assert max_shares(512) == 2
    assert max_shares(2048) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_normed_rotated_and_stored(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, num_heads, eps = 5, 3, 1e-6
    down = torch.randn(num_tokens, RANK + ROPE + num_heads * (NOPE + ROPE)).to(dtype)
    weight = torch.randn(RANK).to(dtype)
    inverse_freq = 10000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    positions = torch.tensor([0, 7, 1000, 4095, 3])
    slots = torch.tensor([4, 0, -1, 7, 2])
    rotations = torch.polar(torch.full((5, ROPE // 2), 1.25), torch.outer(positions.float(), inverse_freq))
    expected = down.clone()
    RmsNorm(weight, eps).apply_(expected[:, :RANK])
    rotate_(expected[:, RANK : RANK + ROPE], rotations)
    q = expected[:, RANK + ROPE :].unflatten(-1, (num_heads, -1))
    rotate_(q[..., NOPE:], rotations.unsqueeze(1))

    down_here = down.to(device)
    cache = torch.zeros(4, 2, RANK + ROPE, dtype=dtype, device=device)
    q_here = down_here[:, RANK + ROPE :].unflatten(-1, (num_heads, -1))
    prepare_mla_rows(
        RowTask(weight.to(device), eps, inverse_freq.to(device), 1.25),
        down_here[:, : RANK + ROPE],
        q_here,
        q_here[..., NOPE:],
        positions.to(device),
        slots.to(device),
        cache,
    )

    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(down_here.cpu(), expected, **tolerance)
    stored = cache.cpu().view(8, -1)
    kept = slots >= 0
    torch.testing.assert_close(stored[slots[kept]], expected[kept, : RANK + ROPE], **tolerance)
    unused = [i for i in range(8) if i not in slots.tolist()]
    assert not stored[unused].any()
