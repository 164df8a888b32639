"""Choosing experts for a token, as DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437) do."""

from __future__ import annotations

import torch

from engine.checkpoint.model_config import MoeConfig
from engine.checkpoint.weights import WeightSource
from engine.layers.linear import Linear


class Gate:
    """Scores in float32, because near-ties decide which experts a token goes to."""

    def __init__(self, config: MoeConfig, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        self._config = config
        self._linear = Linear(weight_ED)
        self._bias_E = bias_E

    def __call__(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_TK float32 and expert_ids_TK int64 (logical)."""
        return choose_experts(self._config, self._linear(x_TD.float()), self._bias_E)


def choose_experts(
    config: MoeConfig, logits_TE: torch.Tensor, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The correction bias of "noaux_tc" moves the choice and never the weights."""
    is_sigmoid = config.scoring == "sigmoid"
    scores_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(dim=-1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if config.topk_method != "greedy" and config.topk_groups < config.num_groups:
        choice_TE = _mask_other_groups(config, choice_TE)
    ids_TK = choice_TE.topk(config.num_experts_per_token, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1.0:
        weights_TK = weights_TK * config.routed_scaling_factor
    return weights_TK, ids_TK


def _mask_other_groups(config: MoeConfig, choice_TE: torch.Tensor) -> torch.Tensor:
    """Only experts of the best groups may be chosen. A group is as good as its best expert, or as its best
    two together under "noaux_tc"."""
    choice_TGE = choice_TE.unflatten(-1, (config.num_groups, -1))
    if config.topk_method == "noaux_tc":
        num_best = min(2, choice_TGE.shape[-1])
        group_scores_TG = choice_TGE.topk(num_best, dim=-1, sorted=False).values.sum(dim=-1)
    else:
        group_scores_TG = choice_TGE.amax(dim=-1)
    groups = group_scores_TG.topk(config.topk_groups, dim=-1, sorted=False).indices
    is_closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, groups, False)
    return choice_TGE.masked_fill(is_closed_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def load_gate(config: MoeConfig, weights: WeightSource, prefix: str, hidden_size: int) -> Gate:
    weight_ED = weights.get(f"{prefix}.weight", (config.num_routed_experts, hidden_size), torch.float32)
    bias_E = None
    if config.topk_method == "noaux_tc":
        bias_E = weights.get(f"{prefix}.e_score_correction_bias", (config.num_routed_experts,), torch.float32)
    return Gate(config, weight_ED, bias_E)
