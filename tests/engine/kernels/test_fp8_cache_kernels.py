"""Kernels over an MLA cache in FP8, against the plain forms over what that cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need the package triton (pip install triton)")

from engine.attention.device_plan import ChunkRows, DevicePlan, GatheredContext
from engine.attention.mla_kernels import MlaKernels
from engine.attention.reference import mla_reference
from engine.checkpoint.model_config import MlaConfig
from engine.kernels.attention_context import ExpandTuning, expand_context
from engine.kernels.attention_decode import DecodeTuning, decode_shares, mla_decode
from engine.kernels.mla_few_rows import merge_and_expand, prepare_few_rows
from engine.kernels.mla_fp8_cache import gather_rows
from engine.kernels.mla_fp8_rows import dequantise_mla_rows, quantise_mla_rows, rope_of, row_bytes
from engine.kernels.mla_rows import prepare_mla_rows
from engine.kernels.row_task import RowTask
from tests.engine.kernels.fp8_rows import fp8_cache, quantised_as_here
from tests.engine.kernels.kernel_batches import padded_tables, scattered_batch

RANK, ROPE, NOPE, VALUE, HEADS = 32, 16, 16, 32, 3
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}


def random_cache(num_blocks: int) -> torch.Tensor:
    """Rows of different sizes: a scale that goes missing, or to another row, is seen."""
    sizes = 2.0 ** torch.randint(-2, 2, (num_blocks, 8, 1))
    return torch.randn(num_blocks, 8, RANK + ROPE) * torch.cat(
        (sizes.expand(-1, -1, RANK), torch.ones(num_blocks, 8, ROPE)), dim=-1
    )


def test_a_row_of_deepseek_s_shape_takes_656_bytes() -> None:
    assert row_bytes(512, 64) == 656
    assert rope_of(656, 512) == 64


def test_a_row_keeps_its_values_to_three_bits_and_its_rotated_dims_to_bfloat16() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, RANK + ROPE) * 10.0 ** torch.randint(-6, 6, (50, 1))
    rows[7] = 0.0
    stored = quantise_mla_rows(rows, RANK)
    found = dequantise_mla_rows(stored, RANK)
    assert stored.shape == (50, row_bytes(RANK, ROPE)) and stored.dtype == torch.uint8
    assert torch.equal(found[:, RANK:], rows[:, RANK:].bfloat16().float())
    latents, largest = rows[:, :RANK], rows[:, :RANK].abs().amax(1, keepdim=True)
    most = torch.maximum(latents.abs() / 16, largest / 448 / 1024) * 1.0001
    assert bool(((found[:, :RANK] - latents).abs() <= most).all())
    is_largest = latents.abs() == largest
    torch.testing.assert_close(found[:, :RANK][is_largest], latents[is_largest], rtol=1e-6, atol=0)


def test_a_cache_that_nobody_wrote_holds_zeros() -> None:
    assert not dequantise_mla_rows(torch.zeros(2, row_bytes(RANK, ROPE), dtype=torch.uint8), RANK).any()


@pytest.mark.parametrize("form", ["few", "many"])
def test_rows_are_stored_as_the_reference_quantises_them(device: str, form: str) -> None:
    """In place, where chunks look for them, they stay exact."""
    torch.manual_seed(0)
    slots = torch.tensor([4, 0, -1, 7])
    down = torch.randn(4, RANK + ROPE + HEADS * (NOPE + ROPE))
    positions = torch.tensor([0, 7, 1000, 4095])
    inverse_freq = 10000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    task = RowTask((torch.rand(RANK) + 0.5).to(device), 1e-6, inverse_freq.to(device), 1.25)

    def prepared(cache: torch.Tensor) -> torch.Tensor:
        """The rows in place."""
        here = down.clone().to(device)
        rows = here[:, : RANK + ROPE]
        q = here[:, RANK + ROPE :].unflatten(-1, (HEADS, -1))
        if form == "few":
            key = torch.zeros(HEADS, NOPE, RANK, device=device)
            prepare_few_rows(task, rows, q, key, positions.to(device), slots.to(device), cache)
        else:
            prepare_mla_rows(task, rows, q, q[..., NOPE:], positions.to(device), slots.to(device), cache)
        return rows.cpu()

    exact = torch.zeros(4, 2, RANK + ROPE, device=device)
    cache = torch.zeros(4, 2, row_bytes(RANK, ROPE), dtype=torch.uint8, device=device)
    in_place = prepared(exact)
    assert torch.equal(prepared(cache), in_place)

    kept = slots[slots >= 0]
    stored, rows = cache.cpu().view(8, -1), exact.cpu().view(8, -1)
    expected = quantised_as_here(rows[kept], RANK)
    if torch.cuda.is_available():  # divisions differ in their last bit there, and few roundings for that
        found, wanted = dequantise_mla_rows(stored[kept], RANK), dequantise_mla_rows(expected, RANK)
        torch.testing.assert_close(found, wanted, rtol=0.126, atol=1e-3)
        assert ((found - wanted).abs() > 1e-3 * wanted.abs()).float().mean() < 0.02
    else:
        assert torch.equal(stored[kept], expected)
    unused = [i for i in range(8) if i not in slots.tolist()]
    assert not stored[unused].any()
    assert not stored[:, -12:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("num_heads", [3, 20])
def test_decode_attends_to_what_the_cache_holds(
    device: str, num_heads: int, shares: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([1, 70, 33, 5], [], 8)
    stored, held = fp8_cache(random_cache(num_blocks), RANK)
    q = torch.randn(4, num_heads, NOPE + ROPE) / 2
    key = torch.randn(num_heads, NOPE, RANK) / RANK**0.5
    value = torch.randn(num_heads, RANK, VALUE) / RANK**0.5
    absorbed = torch.cat((torch.einsum("shn,hnc->shc", q[..., :NOPE], key), q[..., NOPE:]), dim=-1)
    tables = torch.cat((padded_tables(batch), torch.zeros(1, 9, dtype=torch.int32)))
    absorbed = torch.cat((absorbed, absorbed[:1]))  # a padded row has no context

    latent = mla_decode(
        absorbed.to(device, dtype),
        stored.to(device),
        tables.to(device),
        torch.tensor([*batch.context_len, 0], dtype=torch.int32, device=device),
        RANK,
        shares=shares,
        tuning=DecodeTuning(num_rows=16),
    ).cpu()

    found = torch.einsum("shc,hcv->shv", latent[:4].float(), value).double()
    torch.testing.assert_close(found, mla_reference(q, batch, held, key, value), **TOLERANCES[dtype])
    assert not latent[4].any()


def test_tokens_before_the_first_one_are_not_seen(device: str) -> None:
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([21], [], 8)
    stored, held = fp8_cache(random_cache(num_blocks), RANK)
    q = torch.randn(1, HEADS, RANK + ROPE) / 2
    tables = padded_tables(batch).to(device)
    lengths = torch.tensor([21], dtype=torch.int32, device=device)

    found = mla_decode(q.to(device), stored.to(device), tables, lengths, RANK, first_token=1, shares=2)

    rows = held[batch.block_tables[0]].flatten(0, 1)[1:21]
    probs = torch.softmax(torch.einsum("shc,lc->shl", q, rows), dim=-1)
    expected = torch.einsum("shl,lc->shc", probs, rows[:, :RANK])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_merged_shares_of_few_rows(device: str) -> None:
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([1, 70, 33], [], 8)
    stored, held = fp8_cache(random_cache(num_blocks), RANK)
    q = torch.randn(3, HEADS, RANK + ROPE, device=device) / 2
    value = torch.randn(HEADS, RANK, VALUE, device=device)
    tables = padded_tables(batch).to(device)
    lengths = torch.tensor(batch.context_len, dtype=torch.int32, device=device)
    tuning = DecodeTuning(num_rows=16)

    found, expected = (
        merge_and_expand(decode_shares(q, cache, tables, lengths, RANK, 3, tuning=tuning), value)
        for cache in (stored.to(device), held.to(device))
    )

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(9, 37, 0, 64, 16, 3), (0, 0, 0), (1,)])
def test_cached_rows_are_expanded_in_order(device: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([], [(length, 2) for length in lengths], 8)
    stored, held = fp8_cache(random_cache(num_blocks), RANK)
    expansion_KC = torch.randn(HEADS * (NOPE + VALUE), RANK).to(dtype)
    start = torch.tensor([0, *lengths, 0]).cumsum(0).to(torch.int32)  # and a place that is not taken
    tables = torch.cat((padded_tables(batch), torch.zeros(1, 1).expand(1, padded_tables(batch).shape[1])))
    tuning = ExpandTuning(num_rows=16, num_columns=64, depth=16, num_warps=4, num_stages=1, num_programs=4)

    found = expand_context(
        stored.to(device),
        tables.int().to(device),
        start.to(device),
        expansion_KC.to(device),
        HEADS,
        200,
        tuning,
    )

    rows = torch.cat(
        [held[table].flatten(0, 1)[:num] for table, num in zip(batch.block_tables, lengths, strict=True)]
    ).to(dtype)
    expected = (rows[:, :RANK].double() @ expansion_KC.double().T).unflatten(-1, (HEADS, -1))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.key_value_LHK[: len(rows)].cpu().double(), expected, **tolerance)
    assert torch.equal(found.rope_LR[: len(rows)].cpu(), rows[:, RANK:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 21])
def test_rows_are_gathered_as_the_cache_holds_them(device: str, num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stored, held = fp8_cache(random_cache(5), RANK)
    slots = torch.randperm(40)[:num_rows]
    found = gather_rows(stored.to(device), slots.to(device), RANK, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01  # Triton's interpreter cuts instead of rounding
    torch.testing.assert_close(found.cpu(), held.flatten(0, 1)[slots].to(dtype), rtol=tolerance, atol=0)


def test_a_chunk_without_a_graph_attends_to_its_gathered_context(device: str) -> None:
    """Its own rows too as the cache has them."""
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([], [(37, 5)], 8)
    config = MlaConfig(
        q_lora_rank=None,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
    )
    key = torch.randn(HEADS, NOPE, RANK, device=device) / RANK**0.5
    value = torch.randn(HEADS, RANK, VALUE, device=device) / RANK**0.5
    expansion_KC = torch.cat((key, value.transpose(1, 2)), dim=1).flatten(0, 1)
    no_rotation = torch.zeros(ROPE // 2, device=device)
    kernels = MlaKernels(
        config, RowTask(torch.ones(RANK, device=device), 1e-6, no_rotation, 1.0), (key, value), expansion_KC
    )
    stored, _ = fp8_cache(random_cache(num_blocks), RANK)
    cache = stored.clone().to(device)
    q = torch.randn(5, HEADS, NOPE + ROPE) / 2
    starts = torch.tensor([[0, 5], [0, 42]], dtype=torch.int32, device=device)
    context = GatheredContext(batch.block_tables, [42], 0, 8, torch.device(device))
    plan = DevicePlan(
        positions_T=batch.positions_T.to(device),
        slot_mapping_T=batch.slot_mapping_T.to(device),
        num_decodes=0,
        block_tables_SB=torch.empty(0, 1, dtype=torch.int32, device=device),
        context_len_S=torch.empty(0, dtype=torch.int32, device=device),
        chunks=ChunkRows(starts[0], starts[1], context),
    )
    options: dict[str, Any] = {"device": device}

    found = kernels(torch.randn(5, RANK + ROPE, **options), q.to(device), cache, plan)

    held = dequantise_mla_rows(cache.cpu(), RANK)
    assert not torch.equal(cache.cpu(), stored)  # the chunk's own rows went there
    expected = mla_reference(q, batch, held, key.cpu(), value.cpu())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)
