from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.checkpoint.model_config import MoeConfig
from engine.layers.linear import Linear
from engine.moe.dispatch import LocalDispatcher
from engine.moe.experts import Experts
from engine.moe.gate import Gate, choose_experts
from engine.moe.moe_layer import MoeLayer


def moe_config(**changes: Any) -> MoeConfig:
    values: dict[str, Any] = {
        "num_routed_experts": 4,
        "num_shared_experts": 0,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 3,
        "first_dense_layers": 0,
        "moe_layer_freq": 1,
        "scoring": "sigmoid",
        "topk_method": "noaux_tc",
        "num_groups": 1,
        "topk_groups": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }
    return MoeConfig(**(values | changes))


def test_correction_bias_moves_the_choice_but_not_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    weights, ids = choose_experts(moe_config(), logits, torch.tensor([0.0, 0.0, 0.0, 9.0]))

    assert sorted(ids[0].tolist()) == [0, 3]
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids))


def test_best_two_together_choose_the_group_under_noaux_tc() -> None:
    config = moe_config(num_groups=2, topk_groups=1)
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])

    _, ids = choose_experts(config, logits, torch.zeros(4))

    assert sorted(ids[0].tolist()) == [2, 3]


def test_best_expert_chooses_the_group_under_group_limited_greedy() -> None:
    config = moe_config(num_groups=2, topk_groups=1, scoring="softmax", topk_method="group_limited_greedy")
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])

    weights, ids = choose_experts(config, logits, None)

    assert sorted(ids[0].tolist()) == [0, 1]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))


def test_normed_weights_sum_to_the_scaling_factor() -> None:
    config = moe_config(norm_topk_prob=True, routed_scaling_factor=2.5)

    weights, _ = choose_experts(config, torch.randn(5, 4), torch.zeros(4))

    torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.5))


def test_dispatch_sorts_rows_by_expert_and_combine_undoes_it() -> None:
    dispatcher = LocalDispatcher(3)
    x = torch.tensor([[1.0], [10.0]])
    ids = torch.tensor([[2, 0], [0, 2]])

    routed = dispatcher.dispatch(x, ids)

    assert routed.num_tokens_per_expert == [2, 0, 2]
    assert routed.x_RD.flatten().tolist() == [1.0, 10.0, 1.0, 10.0]
    y = routed.x_RD * torch.tensor([[2.0], [2.0], [3.0], [3.0]])  # expert 0 doubles, expert 2 triples
    out = dispatcher.combine(y, torch.tensor([[1.0, 0.5], [1.0, 0.5]]), routed)
    assert out.flatten().tolist() == [4.0, 35.0]


def experts(num: int, hidden: int, size: int) -> tuple[Experts, list[tuple[torch.Tensor, torch.Tensor]]]:
    pairs = [(torch.randn(2 * size, hidden), torch.randn(hidden, size)) for _ in range(num)]
    return Experts([Linear(up) for up, _ in pairs], [Linear(down) for _, down in pairs], size), pairs


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_moe_layer_equals_the_sum_over_chosen_experts(num_tokens: int) -> None:
    torch.manual_seed(0)
    config = moe_config(norm_topk_prob=True)
    gate = Gate(config, torch.randn(4, 6), torch.randn(4))
    fast, pairs = experts(4, 6, 3)
    layer = MoeLayer(gate, LocalDispatcher(4), fast, None, 4)
    x = torch.randn(num_tokens, 6)

    found = layer(x)

    weights, ids = gate(x)
    expected = torch.zeros_like(x)
    for t in range(num_tokens):
        for weight, expert_id in zip(weights[t], ids[t].tolist(), strict=True):
            up_gate, down = pairs[expert_id]
            up, gated = (up_gate @ x[t]).chunk(2)
            expected[t] += weight * (down @ (up * torch.nn.functional.silu(gated)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.take_load(), torch.bincount(ids.flatten(), minlength=4))
    assert layer.take_load().tolist() == [0, 0, 0, 0]


def test_rank_without_experts_computes_nothing() -> None:
    assert Experts([], [], 3)(torch.empty(0, 6), []).shape == (0, 6)
