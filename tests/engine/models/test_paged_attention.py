"""The fast attention forms against the row-by-row reference, over random block tables, chunks and lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import packed
from engine.attention.gqa import GqaAttention
from engine.attention.mla import MlaAttention
from engine.attention.packed import attend_packed, can_pack, plan_packed
from engine.attention.plan import plan_attention, write_rows
from engine.attention.reference import gqa_reference, mla_reference
from engine.checkpoint.model_config import MlaConfig
from engine.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.rms_norm import RmsNorm

UNUSED = Linear(torch.zeros(1, 1))


@st.composite
def batches(draw: st.DrawFn) -> tuple[ForwardBatch, int, int]:
    """A batch, its block size and the number of blocks; tables are runs, or scattered, or both."""
    block_size = draw(st.sampled_from([1, 3, 16]))
    decodes = draw(st.lists(st.integers(1, 70), max_size=4))
    chunks = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 160)), max_size=3))
    scheduled = [(length, 1) for length in decodes] + [(cached + new, new) for cached, new in chunks]
    num_blocks = sum(-(-length // block_size) for length, _ in scheduled) + 1
    free = list(range(num_blocks))
    if draw(st.booleans()):
        draw(st.randoms(use_true_random=False)).shuffle(free)
    tables, starts = [], [0]
    for length, new in scheduled:
        needed = -(-length // block_size)
        tables.append(free[:needed])
        free = free[needed:]
        starts.append(starts[-1] + new)
    num_tokens = starts[-1]
    batch = ForwardBatch(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        positions_T=torch.zeros(num_tokens, dtype=torch.int64),
        slot_mapping_T=torch.zeros(num_tokens, dtype=torch.int64),
        num_decodes=len(decodes),
        query_start=starts,
        context_len=[length for length, _ in scheduled],
        block_tables=tables,
        logits_rows_N=torch.empty(0, dtype=torch.int64),
    )
    return batch, block_size, num_blocks


def mla(num_heads: int, config: MlaConfig) -> tuple[MlaAttention, torch.Tensor, torch.Tensor]:
    key = torch.randn(num_heads, config.qk_nope_head_dim, config.kv_lora_rank) / config.kv_lora_rank**0.5
    value = torch.randn(num_heads, config.kv_lora_rank, config.v_head_dim) / config.kv_lora_rank**0.5
    norm = RmsNorm(torch.ones(config.kv_lora_rank), 1e-6)
    return MlaAttention(config, UNUSED, None, norm, (key, value), UNUSED), key, value


@settings(max_examples=25, deadline=None)
@given(case=batches(), rank=st.sampled_from([8, 1024]), seed=st.integers(0, 99))
def test_mla_equals_the_reference(case: tuple[ForwardBatch, int, int], rank: int, seed: int) -> None:
    batch, block_size, num_blocks = case
    torch.manual_seed(seed)
    config = MlaConfig(
        q_lora_rank=None, kv_lora_rank=rank, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    )
    attention, key, value = mla(3, config)
    cache = torch.randn(num_blocks, block_size, rank + 4)
    q = torch.randn(batch.num_tokens, 3, 10) / 2

    found = attention.attend(q, cache, plan_attention(batch, cache))

    torch.testing.assert_close(
        found.double(), mla_reference(q, batch, cache, key, value), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(case=batches(), heads=st.sampled_from([(1, 1), (6, 2), (4, 4)]), seed=st.integers(0, 99))
def test_gqa_equals_the_reference(
    case: tuple[ForwardBatch, int, int], heads: tuple[int, int], seed: int
) -> None:
    batch, block_size, num_blocks = case
    num_heads, num_kv_heads = heads
    torch.manual_seed(seed)
    attention = GqaAttention(UNUSED, UNUSED, num_heads, num_kv_heads, 8)
    cache = torch.randn(num_blocks, block_size, 2, num_kv_heads, 8)
    q = torch.randn(batch.num_tokens, num_heads, 8) / 2

    found = attention.attend(q.unflatten(1, (num_kv_heads, -1)), cache, plan_attention(batch, cache))

    torch.testing.assert_close(
        found.flatten(1, 2).double(), gqa_reference(q, batch, cache), rtol=1e-4, atol=1e-5
    )


def varlen_reference(
    q_THQ: torch.Tensor,
    k_LKQ: torch.Tensor,
    v_LKQ: torch.Tensor,
    query_start: torch.Tensor,
    context_start: torch.Tensor,
    max_queries: int,
    max_context: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What the library says that it computes: queries are the last rows of their context."""
    assert window_size == (-1, 0)
    assert query_start.diff().max() == max_queries and context_start.diff().max() == max_context
    group = q_THQ.shape[1] // k_LKQ.shape[1]
    parts = []
    for s in range(len(query_start) - 1):
        q = q_THQ[query_start[s] : query_start[s + 1]].double()
        context = slice(context_start[s], context_start[s + 1])
        k, v = (rows[context].double().repeat_interleave(group, dim=1) for rows in (k_LKQ, v_LKQ))
        scores = torch.einsum("thq,lhq->htl", q, k) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
        probs = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        parts.append(torch.einsum("htl,lhq->thq", probs, v))
    return torch.cat(parts).to(q_THQ.dtype)


@settings(max_examples=25, deadline=None)
@given(case=batches(), heads=st.sampled_from([(1, 1), (6, 2), (4, 4)]), seed=st.integers(0, 99))
def test_packed_gqa_equals_the_reference(
    case: tuple[ForwardBatch, int, int], heads: tuple[int, int], seed: int
) -> None:
    """On CUDA the library's kernels, elsewhere what they should do."""
    batch, block_size, num_blocks = case
    if not batch.num_seqs:
        return
    num_heads, num_kv_heads = heads
    torch.manual_seed(seed)
    is_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if is_cuda else ("cpu", torch.float32)
    cache = torch.randn(num_blocks, block_size, 2, num_kv_heads, 8).to(device, dtype)
    q = (torch.randn(batch.num_tokens, num_heads, 8) / 2).to(device, dtype)

    with pytest.MonkeyPatch.context() as patch:
        if not is_cuda:
            patch.setattr(packed, "_library", lambda: varlen_reference)
        found = attend_packed(q, cache, plan_packed(batch, cache)).cpu().double()

    expected = gqa_reference(q.cpu(), batch, cache.cpu())
    tolerance = {"rtol": 0.05, "atol": 0.02} if is_cuda else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)


def test_a_packed_layer_stores_its_rows_and_attends_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_library", lambda: varlen_reference)
    torch.manual_seed(0)
    hidden, num_heads, num_kv_heads, head_dim = 24, 4, 2, 8
    qkv = Linear(torch.randn((num_heads + 2 * num_kv_heads) * head_dim, hidden) / hidden**0.5)
    out = Linear(torch.randn(hidden, num_heads * head_dim) / (num_heads * head_dim) ** 0.5)
    attention = GqaAttention(qkv, out, num_heads, num_kv_heads, head_dim)
    batch, num_blocks = decode_batch([9, 30, 1], 4)
    batch.slot_mapping_T = torch.tensor(
        [
            table[(n - 1) // 4] * 4 + (n - 1) % 4
            for table, n in zip(batch.block_tables, [9, 30, 1], strict=True)
        ]
    )
    batch.slot_mapping_T[1] = -1
    batch.has_unstored_rows = True
    x = torch.randn(3, hidden)
    rotations = torch.polar(torch.ones(3, head_dim // 2), torch.randn(3, head_dim // 2))
    caches = [torch.randn(num_blocks, 4, 2, num_kv_heads, head_dim)] * 2
    caches[1] = caches[0].clone()

    expected = attention(x, caches[0], plan_attention(batch, caches[0]), rotations)
    found = attention(x, caches[1], plan_packed(batch, caches[1]), rotations)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float16, 64, True),
        ("cuda", torch.float32, 128, False),
        ("cuda", torch.bfloat16, 260, False),
        ("cuda", torch.bfloat16, 20, False),
        ("cpu", torch.bfloat16, 128, False),
    ],
)
def test_the_library_has_kernels_for(device: str, dtype: torch.dtype, head_dim: int, expected: bool) -> None:
    assert can_pack(device, dtype, head_dim) is expected


def decode_batch(lengths: list[int], block_size: int) -> tuple[ForwardBatch, int]:
    needed = [-(-length // block_size) for length in lengths]
    ids = list(reversed(range(sum(needed))))
    tables = [ids[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(lengths))]
    batch = ForwardBatch(
        token_ids_T=torch.zeros(len(lengths), dtype=torch.int64),
        positions_T=torch.zeros(len(lengths), dtype=torch.int64),
        slot_mapping_T=torch.zeros(len(lengths), dtype=torch.int64),
        num_decodes=len(lengths),
        query_start=list(range(len(lengths) + 1)),
        context_len=lengths,
        block_tables=tables,
        logits_rows_N=torch.empty(0, dtype=torch.int64),
    )
    return batch, sum(needed)


def test_small_rows_decode_padded_and_large_rows_one_by_one() -> None:
    batch, num_blocks = decode_batch([9, 30], 4)

    small = plan_attention(batch, torch.zeros(num_blocks, 4, 80))
    large = plan_attention(batch, torch.zeros(num_blocks, 4, 4096))

    assert small.padded_decodes is not None and small.decodes == []
    assert large.padded_decodes is None and len(large.decodes) == 2


def test_a_given_padded_table_is_used() -> None:
    batch, num_blocks = decode_batch([9, 30], 4)
    width = max(len(table) for table in batch.block_tables) + 3
    batch.block_tables_SB = torch.tensor([table + [0] * (width - len(table)) for table in batch.block_tables])
    attention = GqaAttention(UNUSED, UNUSED, 2, 1, 4)
    cache, q = torch.randn(num_blocks, 4, 2, 1, 4), torch.randn(2, 2, 4)

    found = attention.attend(q.unflatten(1, (1, -1)), cache, plan_attention(batch, cache))

    torch.testing.assert_close(
        found.flatten(1, 2).double(), gqa_reference(q, batch, cache), rtol=1e-4, atol=1e-5
    )


def test_contiguous_blocks_are_read_without_a_copy() -> None:
    batch, num_blocks = decode_batch([70], 16)
    batch.block_tables = [sorted(batch.block_tables[0])]
    cache = torch.randn(num_blocks, 16, 4096)

    context = plan_attention(batch, cache).decodes[0]

    assert context.rows(cache).data_ptr() == cache.data_ptr()
    assert context.rows(cache).shape == (70, 4096)


def test_prompt_chunk_expands_only_when_that_is_less_work() -> None:
    config = MlaConfig(
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    attention, _, _ = mla(1, config)

    assert attention._is_expanding_cheaper(num_queries=128, num_rows=128)
    assert not attention._is_expanding_cheaper(num_queries=16, num_rows=512)


def test_rows_are_written_to_their_slots_and_nowhere_else() -> None:
    cache = torch.zeros(3, 2, 4)

    write_rows(cache, torch.tensor([5, 0]), torch.tensor([[1.0] * 4, [2.0] * 4]))

    assert cache[2, 1].tolist() == [1.0] * 4
    assert cache[0, 0].tolist() == [2.0] * 4
    assert cache.count_nonzero() == 8
