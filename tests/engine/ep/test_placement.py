import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ep.placement import ExpertPlacement

NUM_EXPERTS = st.integers(1, 300)
NUM_RANKS = st.integers(1, 64)


@given(NUM_EXPERTS, NUM_RANKS)
def test_every_expert_has_exactly_one_rank(num_experts, num_ranks):
    placement = ExpertPlacement(num_experts, num_ranks)

    placed = [expert for rank in range(num_ranks) for expert in placement.local_experts(rank)]

    assert placed == list(range(num_experts))


@given(NUM_EXPERTS, NUM_RANKS)
def test_ranks_differ_by_at_most_one_expert_and_the_first_hold_more(num_experts, num_ranks):
    placement = ExpertPlacement(num_experts, num_ranks)

    sizes = [len(placement.local_experts(rank)) for rank in range(num_ranks)]

    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert sizes.count(sizes[0]) == (num_experts % num_ranks or num_ranks)


@given(NUM_EXPERTS, NUM_RANKS)
def test_rank_of_expert_is_the_inverse_of_local_experts(num_experts, num_ranks):
    placement = ExpertPlacement(num_experts, num_ranks)

    rank_of_expert = placement.rank_of_expert

    assert all(expert in placement.local_experts(rank_of_expert[expert]) for expert in range(num_experts))
    assert len(rank_of_expert) == num_experts


def test_more_ranks_than_experts_leaves_the_last_ranks_empty():
    placement = ExpertPlacement(2, 3)

    assert [list(placement.local_experts(rank)) for rank in range(3)] == [[0], [1], []]


def test_no_experts_cannot_be_placed():
    with pytest.raises(ValueError, match="0 experts on 2 ranks"):
        ExpertPlacement(0, 2)
