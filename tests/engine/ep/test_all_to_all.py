"""AllToAllDispatcher on N processes against LocalDispatcher on one, bit for bit."""

import itertools

import pytest
import torch
from ep_ranks import run_ranks

import engine.ep.all_to_all
from engine.ep.ep_group import EpGroup
from engine.moe.dispatch import LocalDispatcher

HIDDEN = 24
NUM_EXPERTS = [16, 6, 5, 3, 1]
NUM_TOKENS = [[7, 0, 1, 13], [0, 0, 5, 0], [1, 1, 1, 1], [0, 40, 0, 3]]  # by rank
DTYPES = [torch.float32, torch.bfloat16]


def batch(rank, step, num_tokens, num_experts, dtype):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    k = min(4, num_experts)
    x_TD = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices
    return x_TD, ids_TK, torch.rand(num_tokens, k, generator=generator)


def run_experts(x_RD, num_tokens_per_expert, local_experts):
    """Row by row, so that the result does not depend on which rows share a batch."""
    assert sum(num_tokens_per_expert) == x_RD.shape[0]
    counts = torch.tensor(num_tokens_per_expert, dtype=torch.int64)
    expert_R = torch.tensor(local_experts, dtype=torch.int64).repeat_interleave(counts)
    return torch.sin(x_RD * (1 + expert_R.unsqueeze(1))).to(x_RD.dtype)


def forward(dispatcher, x_TD, ids_TK, weights_TK):
    routed = dispatcher.dispatch(x_TD, ids_TK)
    y_RD = run_experts(routed.x_RD, routed.num_tokens_per_expert, dispatcher.local_experts)
    return dispatcher.combine(y_RD, weights_TK, routed)


def slow_reference(x_TD, ids_TK, weights_TK):
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, k in itertools.product(range(ids_TK.shape[0]), range(ids_TK.shape[1])):
        expert = int(ids_TK[t, k])
        out_TD[t] += weights_TK[t, k].double() * run_experts(x_TD[t : t + 1], [1], [expert])[0].double()
    return out_TD


def count_differences(group: EpGroup, max_needless_bytes: int) -> list[str]:
    engine.ep.all_to_all._MAX_NEEDLESS_BYTES = max_needless_bytes
    wrong = []
    cases = itertools.product(NUM_EXPERTS, DTYPES, enumerate(NUM_TOKENS))
    for num_experts, dtype, (step, num_tokens) in cases:
        inputs = batch(group.rank, step, num_tokens[group.rank], num_experts, dtype)
        if not group.agree(num_tokens[group.rank]):
            continue
        found = forward(group.dispatcher(num_experts), *inputs)
        expected = forward(LocalDispatcher(num_experts), *inputs)
        if found.dtype != dtype or not torch.equal(found, expected):
            wrong.append(f"E={num_experts} {dtype} tokens={num_tokens}")
    return wrong


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_what_one_rank_with_all_experts_computes(size):
    assert run_ranks(size, count_differences, 1 << 40) == [[]] * size


@pytest.mark.parametrize("size", [2, 4])
def test_sending_only_needed_rows_changes_nothing(size):
    assert run_ranks(size, count_differences, -1) == [[]] * size


def test_the_local_dispatcher_computes_what_a_plain_loop_does():
    inputs = batch(0, 0, 9, 16, torch.float32)

    found = forward(LocalDispatcher(16), *inputs)

    torch.testing.assert_close(found.double(), slow_reference(*inputs), rtol=1e-5, atol=1e-6)


def count_rows_sent(group: EpGroup, max_needless_bytes: int) -> int:
    """Rows that this rank sends when all its tokens want expert 0, which lives on rank 0."""
    engine.ep.all_to_all._MAX_NEEDLESS_BYTES = max_needless_bytes
    num_sent = []
    real = group.all_to_all

    def counting(received, sent, received_splits=None, sent_splits=None):
        num_sent.append(sent.shape[0] if sent.dim() == 2 else 0)
        real(received, sent, received_splits, sent_splits)

    group.all_to_all = counting
    group.agree(8)
    dispatcher = group.dispatcher(6)
    dispatcher.dispatch(torch.randn(8, HIDDEN), torch.zeros(8, 1, dtype=torch.int64))
    return sum(num_sent)


def test_rows_travel_only_where_needed_when_that_saves_enough():
    assert run_ranks(3, count_rows_sent, 0) == [0, 8, 8]


def test_rows_travel_everywhere_when_counts_would_cost_more():
    assert run_ranks(3, count_rows_sent, 1 << 40) == [16, 16, 16]


def claim_wrong_count(group: EpGroup) -> str:
    group.agree(3)
    try:
        group.dispatcher(4).dispatch(torch.randn(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64))
    except AssertionError as error:
        return str(error)
    return "nothing raised"


def test_a_batch_other_than_agreed_is_refused_before_it_is_sent():
    assert run_ranks(2, claim_wrong_count) == ["a batch of 2 rows, but agree() was told 3"] * 2
