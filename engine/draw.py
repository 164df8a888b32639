"""Drawing a token a row, by inversion: the first token, by id, whose cumulated weight exceeds u of the whole.

What is drawn depends on the row's logits, its parameters and u; never on the other rows of the batch. So
truncation is by value: tokens that tie with the last one kept are kept, whatever a sort does to equals.

N rows, V vocabulary, C candidates: the largest values of a row. On the CPU numpy selects, sorts and finds the
largest many times faster than torch does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NUM_CANDIDATES = 256  # enough for nearly all truncated rows; the others pay for a full sort
_STRIDE = 128  # of the coarse level of a search through a whole vocabulary


@dataclass(frozen=True, slots=True)
class Truncation:
    """[N] each; neutral values are 0, 1 and 0."""

    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32

    def rows(self, index_N: torch.Tensor) -> Truncation:
        return Truncation(self.top_k[index_N], self.top_p[index_N], self.min_p[index_N])


def argmax(logits_NV: torch.Tensor) -> list[int]:
    largest = logits_NV.numpy().argmax(1) if logits_NV.device.type == "cpu" else logits_NV.argmax(1)
    token_ids: list[int] = largest.tolist()
    return token_ids


def draw(scaled_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]. Logits are divided by the temperature, their maximum is 0; u is float64 in [0, 1)."""
    weights_NV = scaled_NV.exp()
    num_rows, vocab_size = weights_NV.shape
    if vocab_size % _STRIDE or vocab_size <= _STRIDE * _STRIDE // 8:
        return _invert(weights_NV, u_N)
    # The same search in two levels: to cumulate all of a vocabulary costs more than its exponentials.
    parts_NPW = weights_NV.view(num_rows, -1, _STRIDE)
    cumulated_NP = parts_NPW.sum(2).cumsum(1, dtype=torch.float64)
    target_N1 = u_N.unsqueeze(1) * cumulated_NP[:, -1:]
    part_N1 = _search(cumulated_NP, target_N1)
    before_N1 = torch.where(part_N1 > 0, cumulated_NP.gather(1, (part_N1 - 1).clamp(min=0)), 0.0)
    inside_N1 = (target_N1 - before_N1) / (cumulated_NP.gather(1, part_N1) - before_N1)
    part_NW = parts_NPW[torch.arange(num_rows, device=part_N1.device), part_N1.squeeze(1)]
    return part_N1.squeeze(1) * _STRIDE + _invert(part_NW, inside_N1.squeeze(1))


def draw_truncated(scaled_NV: torch.Tensor, truncation: Truncation, u_N: torch.Tensor) -> torch.Tensor:
    """As draw(), from the tokens that top_k, then top_p of what that left, then min_p leave."""
    threshold_N1 = _thresholds(scaled_NV, truncation)
    # Kept tokens of each row side by side, in the order of ids.
    rows_K, ids_K = (scaled_NV >= threshold_N1).nonzero(as_tuple=True)
    counts_N = torch.bincount(rows_K, minlength=scaled_NV.shape[0])
    places_K = torch.arange(rows_K.shape[0], device=rows_K.device) - (counts_N.cumsum(0) - counts_N)[rows_K]
    shape = (scaled_NV.shape[0], int(counts_N.max()))
    weights_NC = torch.zeros(shape, dtype=torch.float64, device=scaled_NV.device)
    weights_NC[rows_K, places_K] = scaled_NV[rows_K, ids_K].double().exp()
    ids_NC = torch.zeros(shape, dtype=torch.int64, device=scaled_NV.device)
    ids_NC[rows_K, places_K] = ids_K
    return ids_NC.gather(1, _invert(weights_NC, u_N).unsqueeze(1)).squeeze(1)


def _thresholds(scaled_NV: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """[N, 1]: the smallest value of each row that may be drawn."""
    vocab_size = scaled_NV.shape[1]
    largest_k = int(truncation.top_k.clamp(max=vocab_size).max())
    num_candidates = min(vocab_size, max(NUM_CANDIDATES, largest_k))
    threshold_N1, is_exact_N = _thresholds_by_candidates(scaled_NV, truncation, num_candidates)
    if not bool(is_exact_N.all()):
        rows = (~is_exact_N).nonzero().squeeze(1)
        threshold_N1[rows], _ = _thresholds_by_candidates(scaled_NV[rows], truncation.rows(rows), vocab_size)
    return threshold_N1


def _thresholds_by_candidates(
    scaled_NV: torch.Tensor, truncation: Truncation, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 1], and [N]: whether the candidates were enough to tell."""
    values_NC = _largest(scaled_NV, num_candidates)
    has_top_k_N1 = (truncation.top_k > 0).unsqueeze(1)
    num_kept_N1 = torch.where(has_top_k_N1, truncation.top_k.unsqueeze(1), num_candidates)
    places_C = torch.arange(num_candidates, device=values_NC.device)
    weights_NC = values_NC.double().exp() * (places_C < num_kept_N1)
    # With top_k the rest of the vocabulary has no mass any more; without it everything counts.
    mass_N1 = weights_NC.sum(1, keepdim=True)
    if not bool(has_top_k_N1.all()):
        all_mass_N1 = scaled_NV.exp().sum(1, keepdim=True).double()
        mass_N1 = torch.where(has_top_k_N1, mass_N1, all_mass_N1)
    before_NC = weights_NC.cumsum(1) - weights_NC
    is_kept_NC = (before_NC < truncation.top_p.unsqueeze(1).double() * mass_N1) & (weights_NC > 0)
    is_kept_NC[:, 0] = True
    last_kept_N1 = is_kept_NC.sum(1, keepdim=True) - 1
    threshold_N1 = torch.maximum(values_NC.gather(1, last_kept_N1), truncation.min_p.log().unsqueeze(1))
    # With top_k at the last candidate and nothing cut after it, its value is the threshold all the same.
    is_exact_N1 = has_top_k_N1 | (values_NC[:, -1:] < threshold_N1)
    return threshold_N1, is_exact_N1.squeeze(1)


def _largest(scaled_NV: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """[N, C], largest first."""
    if scaled_NV.device.type != "cpu":
        return scaled_NV.topk(num_candidates, dim=1).values
    values = scaled_NV.numpy()
    first = values.shape[1] - num_candidates
    if first:
        values = np.partition(values, first, axis=1)[:, first:]
    return torch.from_numpy(np.sort(values, axis=1)[:, ::-1].copy())


def _invert(weights_NC: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: index of the first column where the cumulated weight exceeds u of the whole."""
    cumulated_NC = weights_NC.cumsum(1, dtype=torch.float64)
    return _search(cumulated_NC, u_N.unsqueeze(1) * cumulated_NC[:, -1:]).squeeze(1)


def _search(cumulated_NC: torch.Tensor, target_N1: torch.Tensor) -> torch.Tensor:
    """int64 [N, 1]: the first column above the target. Where rounding has made that the whole, the last
    column with any weight."""
    index_N1 = torch.searchsorted(cumulated_NC, target_N1, right=True)
    last_N1 = torch.searchsorted(cumulated_NC, cumulated_NC[:, -1:].contiguous())
    return torch.minimum(index_N1, last_N1)
