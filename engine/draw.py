"""Drawing a token a row, by inversion: the first token, in the order of ids, whose cumulated probability
exceeds u.

What is drawn depends on the row's logits, its parameters and u; never on the other rows of the batch. So
truncation is by value (tokens that tie with the last one kept are kept), and the order of a sort among equals
does not matter.

N rows, V vocabulary, C candidates: the likeliest tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_CANDIDATES = 256  # enough for nearly all truncated rows; the others pay for a full sort


@dataclass(frozen=True, slots=True)
class Truncation:
    """Per row; neutral values are 0, 1 and 0."""

    top_k_N: torch.Tensor  # int64
    top_p_N: torch.Tensor  # float32
    min_p_N: torch.Tensor  # float32

    def rows(self, index_N: torch.Tensor) -> Truncation:
        return Truncation(self.top_k_N[index_N], self.top_p_N[index_N], self.min_p_N[index_N])


def draw(scaled_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]. Logits are divided by the temperature, their maximum is 0; u is float64 in [0, 1)."""
    return _invert(scaled_NV.exp(), u_N)


def draw_truncated(scaled_NV: torch.Tensor, truncation: Truncation, u_N: torch.Tensor) -> torch.Tensor:
    """As draw(), from the tokens that top_k, then top_p of what that left, then min_p leave."""
    vocab_size = scaled_NV.shape[1]
    largest_k = int(truncation.top_k_N.clamp(max=vocab_size).max())
    num_candidates = min(vocab_size, max(NUM_CANDIDATES, 2 * largest_k))
    tokens_N, is_exact_N = _draw_from_candidates(scaled_NV, truncation, u_N, num_candidates)
    if not bool(is_exact_N.all()):
        rows = (~is_exact_N).nonzero().squeeze(1)
        tokens_N[rows], _ = _draw_from_candidates(
            scaled_NV[rows], truncation.rows(rows), u_N[rows], vocab_size
        )
    return tokens_N


def _draw_from_candidates(
    scaled_NV: torch.Tensor, truncation: Truncation, u_N: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and whether the candidates held everything that could have been drawn."""
    values_NC, ids_NC = scaled_NV.topk(num_candidates, dim=1)
    threshold_N1 = _threshold(scaled_NV, values_NC, truncation)
    is_kept_NC = values_NC >= threshold_N1
    is_exact_N = values_NC[:, -1] < threshold_N1.squeeze(1)
    if num_candidates == scaled_NV.shape[1]:
        is_exact_N = torch.ones_like(is_exact_N)
    ids_NC, order_NC = ids_NC.sort(dim=1)
    weights_NC = (values_NC.exp() * is_kept_NC).gather(1, order_NC)
    return ids_NC.gather(1, _invert(weights_NC, u_N).unsqueeze(1)).squeeze(1), is_exact_N


def _threshold(scaled_NV: torch.Tensor, values_NC: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """[N, 1]: the smallest kept value, as far as the candidates show it."""
    num_candidates = values_NC.shape[1]
    has_top_k_N1 = (truncation.top_k_N > 0).unsqueeze(1)
    last_index_N1 = torch.where(has_top_k_N1, truncation.top_k_N.unsqueeze(1), num_candidates) - 1
    kth_value_N1 = values_NC.gather(1, last_index_N1.clamp(max=num_candidates - 1))
    weights_NC = (values_NC.exp() * (values_NC >= kth_value_N1)).double()
    # With top_k the rest of the vocabulary has no mass any more; without it everything counts.
    all_mass_N1 = scaled_NV.exp().sum(1, keepdim=True, dtype=torch.float64)
    mass_N1 = torch.where(has_top_k_N1, weights_NC.sum(1, keepdim=True), all_mass_N1)
    before_NC = weights_NC.cumsum(1) - weights_NC
    is_kept_NC = (before_NC < truncation.top_p_N.unsqueeze(1).double() * mass_N1) & (weights_NC > 0)
    is_kept_NC[:, 0] = True
    last_kept_N1 = is_kept_NC.sum(1, keepdim=True) - 1
    return torch.maximum(values_NC.gather(1, last_kept_N1), truncation.min_p_N.log().unsqueeze(1))


def _invert(weights_NC: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: index of the first column where the cumulated weight exceeds u of the whole."""
    cumulated_NC = weights_NC.cumsum(1, dtype=torch.float64)
    target_N1 = u_N.unsqueeze(1) * cumulated_NC[:, -1:]
    index_N = torch.searchsorted(cumulated_NC, target_N1, right=True).squeeze(1)
    return index_N.clamp_(max=weights_NC.shape[1] - 1)
