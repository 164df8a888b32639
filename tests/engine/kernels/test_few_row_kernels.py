"""The joined kernels of a small decode step against those that they join."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from engine.kernels.attention_decode import DecodeTuning, decode_shares, mla_decode
from engine.kernels.dependent_launch import launch_options
from engine.kernels.few_rows import FewRowsTile
from engine.kernels.mla_few_rows import merge_and_expand, prepare_few_rows
from engine.kernels.mla_rows import prepare_mla_rows
from engine.kernels.moe_combine import combine_into_norm_, combine_pairs
from engine.kernels.moe_gate import GateSpec, choose_experts_fused, new_gate_state
from engine.kernels.moe_gemm import ExpertWeights
from engine.kernels.moe_tiles import OneTokenTiles
from engine.kernels.rms_norm import add_rms_norm_
from engine.kernels.row_task import RowTask
from engine.moe.expert_products import run_experts, run_experts_reference
from tests.engine.kernels.kernel_batches import padded_tables, scattered_batch

RANK, ROPE, NOPE, VALUE, HEADS = 32, 16, 16, 32, 3
PLAIN = GateSpec(
    num_experts=12,
    num_shared=2,
    top_k=3,
    is_sigmoid=False,
    num_groups=1,
    topk_groups=1,
    is_group_of_two=False,
    norm_weights=False,
    scaling_factor=1.0,
)
GROUPED = GateSpec(
    num_experts=12,
    num_shared=0,
    top_k=3,
    is_sigmoid=True,
    num_groups=4,
    topk_groups=2,
    is_group_of_two=True,
    norm_weights=True,
    scaling_factor=2.5,
)


def test_launches_overlap_on_hopper_only() -> None:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    assert launch_options(1)["launch_pdl"] == launch_options(1)["DEPENDENT"] == is_hopper
    assert not launch_options(100_000)["launch_pdl"]


@pytest.mark.parametrize("spec", [PLAIN, GROUPED])
def test_experts_of_one_token(spec: GateSpec, device: str) -> None:
    """Sizes that are no multiple of a program's outputs."""
    torch.manual_seed(1)
    x = torch.randn(1, 21, device=device)
    gate = torch.randn(1, spec.num_experts, 21, device=device)
    bias = torch.randn(spec.num_experts, device=device) if spec.is_sigmoid else None
    choice = choose_experts_fused(x, gate, bias, spec, new_gate_state(spec.num_experts, device))
    up_gate = torch.randn(spec.num_all_experts, 2 * 10, 21, device=device)
    weights = ExpertWeights(up_gate, torch.randn(spec.num_all_experts, 21, 10, device=device))

    found = run_experts(x, choice, spec, weights, OneTokenTiles(FewRowsTile(4, 4), FewRowsTile(2, 4)))

    expected = run_experts_reference(x, choice, spec, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combining_into_a_norm_is_the_sum_and_then_the_norm(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(21, 70, dtype=dtype, device=device)
    weights = torch.rand(7, 3, device=device)
    x, norm_weight = torch.randn(7, 70, dtype=dtype, device=device), torch.rand(70, device=device).to(dtype)
    total = x.clone()
    expected = add_rms_norm_(total, combine_pairs(y, weights), norm_weight, 1e-6)

    found = combine_into_norm_(y, weights, x, norm_weight, 1e-6)

    assert torch.equal(x, total)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rows_and_absorbed_queries_in_one_launch(num_tokens: int, device: str) -> None:
    torch.manual_seed(0)
    row_size = RANK + ROPE
    down = torch.randn(num_tokens, row_size + HEADS * (NOPE + ROPE), device=device)
    kept = down.clone()
    key = torch.randn(HEADS, NOPE, RANK, device=device)
    inverse_freq = 10000.0 ** (-torch.arange(0, ROPE, 2, device=device) / ROPE)
    task = RowTask(torch.rand(RANK, device=device), 1e-6, inverse_freq, 1.25)
    positions = torch.tensor([7, 0, 1000], device=device)[:num_tokens]
    slots = torch.tensor([4, -1, 0], device=device)[:num_tokens]
    cache, expected_cache = torch.zeros(2, 4, 2, row_size, device=device).unbind()
    q = down[:, row_size:].unflatten(-1, (HEADS, -1))

    found = prepare_few_rows(task, down[:, :row_size], q, key, positions, slots, cache)

    assert torch.equal(down, kept)
    rotated = q.new_empty(num_tokens, HEADS, ROPE)
    prepare_mla_rows(task, down[:, :row_size], q, rotated, positions, slots, expected_cache)
    absorbed = torch.einsum("thn,hnc->thc", kept[:, row_size:].unflatten(-1, (HEADS, -1))[..., :NOPE], key)
    assert torch.equal(cache, expected_cache)
    torch.testing.assert_close(found, torch.cat((absorbed, rotated), dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [1, 3])
def test_merged_shares_are_expanded_to_values(shares: int, device: str) -> None:
    """A padded row has no context and gives zeros."""
    torch.manual_seed(0)
    batch, num_blocks = scattered_batch([1, 70, 33], [], 8)
    cache = torch.randn(num_blocks, 8, RANK + ROPE, device=device)
    q = torch.randn(4, HEADS, RANK + ROPE, device=device) / 2
    value = torch.randn(HEADS, RANK, VALUE, device=device)
    tables = torch.cat((padded_tables(batch), torch.zeros(1, 9, dtype=torch.int32))).to(device)
    lengths = torch.tensor([*batch.context_len, 0], dtype=torch.int32, device=device)
    tuning = DecodeTuning(num_rows=16)

    parts = decode_shares(q, cache, tables, lengths, RANK, shares, tuning=tuning)
    found = merge_and_expand(parts, value)

    latent = mla_decode(q, cache, tables, lengths, RANK, shares=shares, tuning=tuning)
    torch.testing.assert_close(found, torch.einsum("shc,hcv->shv", latent, value), rtol=1e-4, atol=1e-5)
    assert not found[3].any()
