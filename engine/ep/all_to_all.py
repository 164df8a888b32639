"""Dispatch and combine over the ranks of a group.

T tokens of this rank, K experts per token, E logical experts, D hidden, N ranks,
A rows that arrived (own rows first, then by source rank), R (row, expert) pairs of A for experts of this
rank.

Life of one layer's exchange:
1. A row travels once to each rank, however many of its experts live there, with its K expert ids behind
   its D values (ids reinterpreted as the row's dtype: no second collective). agree() told the number of
   tokens of every rank, so by default every row goes to every rank that holds experts, and nobody asks
   for counts first: with K experts per token and few ranks almost every row is needed almost everywhere.
2. Where that would carry much more than needed (many ranks, many tokens), ranks exchange counts first and
   send to each rank only the rows that it needs. The choice depends only on what all ranks know alike.
3. The receiver finds its (row, expert) pairs and sorts them by expert.
4. combine: each pair's result goes back to the row's source, in the order of (token, k). Results are not
   summed on the way: the source adds them in the order of k, as LocalDispatcher does, whatever the number
   of ranks.
A rank's own rows and results do not pass through the collective. Index arithmetic is numpy on the host: the
arrays are small, and torch takes several times as long for each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.ep.placement import ExpertPlacement
from engine.moe.dispatch import Routed, weigh_and_sum

_ID_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value of the rows
# Below this many needless bytes from one rank, a collective for counts (about 0.3 ms with gloo) costs more.
_MAX_NEEDLESS_BYTES = 512 * 1024

Ints = NDArray[np.integer]


class Exchange(Protocol):
    """The part of EpGroup that moves rows."""

    rank: int
    size: int
    num_tokens_per_rank: list[int]

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: list[int] | None = None,
        sent_splits: list[int] | None = None,
    ) -> None: ...


@dataclass(slots=True)
class RoutedFromPeers(Routed):
    """origin_TK indexes the results as combine() lays them out: own first, then by rank, by (token, k)."""

    home_order: torch.Tensor  # int64 [R]: the row of y_RD of each pair, in the order of arrival
    num_own_results: int  # pairs of this rank's own rows
    results_sent: list[int]  # to each rank, 0 to this one
    results_received: list[int]  # from each rank, 0 from this one


class AllToAllDispatcher:
    def __init__(self, exchange: Exchange, num_experts: int) -> None:
        placement = ExpertPlacement(num_experts, exchange.size)
        self.local_experts = placement.local_experts(exchange.rank)
        self._exchange = exchange
        self._rank_of_expert_E = np.array(placement.rank_of_expert)
        self._has_experts = [len(placement.local_experts(rank)) > 0 for rank in range(exchange.size)]

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> RoutedFromPeers:
        (num_tokens, hidden), k = x_TD.shape, expert_ids_TK.shape[1]
        num_agreed = self._exchange.num_tokens_per_rank[self._exchange.rank]
        assert num_tokens == num_agreed, f"a batch of {num_tokens} rows, but agree() was told {num_agreed}"
        ids_TK = expert_ids_TK.numpy()
        rank_of_pair_TK = self._rank_of_expert_E[ids_TK]
        rows_AX, rows_received = self._exchange_rows(x_TD, ids_TK, rank_of_pair_TK)

        local_ids = _ids_of(rows_AX, hidden).ravel() - self.local_experts.start
        pair_R = np.flatnonzero((local_ids >= 0) & (local_ids < len(self.local_experts)))
        local_id_R = local_ids[pair_R]
        order_R = np.argsort(local_id_R, kind="stable")
        # The copy of the values pays: index_select is slow on rows with a gap behind each.
        x_AD = rows_AX[:, :hidden].contiguous()
        num_own_results, results_sent = self._split_by_source(pair_R, k, num_tokens, rows_received)
        results_received = np.bincount(rank_of_pair_TK.ravel(), minlength=self._exchange.size).tolist()
        return RoutedFromPeers(
            x_RD=x_AD.index_select(0, torch.from_numpy(pair_R[order_R] // k)),
            num_tokens_per_expert=np.bincount(local_id_R, minlength=len(self.local_experts)).tolist(),
            origin_TK=torch.from_numpy(self._result_index(rank_of_pair_TK)),
            home_order=torch.from_numpy(_invert(order_R)),
            num_own_results=num_own_results,
            results_sent=results_sent,
            results_received=self._without_own(results_received),
        )

    def combine(self, y_RD: torch.Tensor, weights_TK: torch.Tensor, routed: Routed) -> torch.Tensor:
        assert isinstance(routed, RoutedFromPeers)
        num_own = routed.num_own_results
        results_PD = y_RD.new_empty(routed.origin_TK.numel(), y_RD.shape[1])  # P pairs of this rank's tokens
        torch.index_select(y_RD, 0, routed.home_order[:num_own], out=results_PD[:num_own])
        sent = y_RD.index_select(0, routed.home_order[num_own:])
        self._exchange.all_to_all(results_PD[num_own:], sent, routed.results_received, routed.results_sent)
        return weigh_and_sum(results_PD, weights_TK, routed.origin_TK)

    def _exchange_rows(
        self, x_TD: torch.Tensor, ids_TK: Ints, rank_of_pair_TK: Ints
    ) -> tuple[torch.Tensor, list[int]]:
        """rows_AX (X = D values and K ids) and how many of them came from each rank, 0 from this one."""
        (num_tokens, hidden), k = x_TD.shape, ids_TK.shape[1]
        sends_needed_only = self._needless_bytes(k, (hidden + k) * x_TD.element_size()) > _MAX_NEEDLESS_BYTES
        if sends_needed_only:
            sent_rows, rows_sent = self._needed_rows(rank_of_pair_TK)
            rows_received = self._exchange_counts(rows_sent)
        else:
            rows_sent = self._without_own([num_tokens * has for has in self._has_experts])
            has_own = self._has_experts[self._exchange.rank]
            rows_received = self._without_own([num * has_own for num in self._exchange.num_tokens_per_rank])
        rows_AX = x_TD.new_empty(num_tokens + sum(rows_received), hidden + k)
        own_TX = rows_AX[:num_tokens]
        own_TX[:, :hidden] = x_TD
        _ids_of(own_TX, hidden)[:] = ids_TK
        if sends_needed_only:
            sent = own_TX.index_select(0, torch.from_numpy(sent_rows))
        else:
            num_copies = sum(num > 0 for num in rows_sent)
            sent = own_TX.repeat(num_copies, 1) if num_copies > 1 else own_TX[: sum(rows_sent)]
        self._exchange.all_to_all(rows_AX[num_tokens:], sent, rows_received, rows_sent)
        return rows_AX, rows_received

    def _needless_bytes(self, k: int, row_bytes: int) -> float:
        """Expected bytes of rows that the busiest rank would send to ranks that do not need them."""
        size = self._exchange.size
        return max(self._exchange.num_tokens_per_rank) * row_bytes * (size - 1) * (1 - 1 / size) ** k

    def _needed_rows(self, rank_of_pair_TK: Ints) -> tuple[Ints, list[int]]:
        """Rows to send, grouped by destination rank, and their number for each."""
        num_tokens = rank_of_pair_TK.shape[0]
        is_needed_NT = np.zeros((self._exchange.size, num_tokens), dtype=np.bool_)
        is_needed_NT[rank_of_pair_TK, np.arange(num_tokens)[:, np.newaxis]] = True
        is_needed_NT[self._exchange.rank] = False
        return is_needed_NT.nonzero()[1], is_needed_NT.sum(1).tolist()

    def _exchange_counts(self, rows_sent: list[int]) -> list[int]:
        counts = torch.empty(len(rows_sent), dtype=torch.int64)
        self._exchange.all_to_all(counts, torch.tensor(rows_sent))
        return counts.tolist()

    def _split_by_source(
        self, pair_R: Ints, k: int, num_tokens: int, rows_received: list[int]
    ) -> tuple[int, list[int]]:
        """Of the ascending pairs: how many belong to own rows, and how many to each other rank's."""
        row_ends = itertools.accumulate(rows_received, initial=num_tokens)
        pair_ends = np.searchsorted(pair_R, [end * k for end in row_ends]).tolist()
        return pair_ends[0], [end - start for start, end in itertools.pairwise(pair_ends)]

    def _result_index(self, rank_of_pair_TK: Ints) -> Ints:
        """Where combine() lays out the result of each (token, k)."""
        own_first = np.where(rank_of_pair_TK == self._exchange.rank, -1, rank_of_pair_TK)
        return _invert(np.argsort(own_first, axis=None, kind="stable")).reshape(rank_of_pair_TK.shape)

    def _without_own(self, num_per_rank: list[int]) -> list[int]:
        num_per_rank[self._exchange.rank] = 0
        return num_per_rank


def _ids_of(rows_AX: torch.Tensor, hidden: int) -> Ints:
    """The K ids behind the D values of each row: a view of the same memory."""
    ids_AK: Ints = rows_AX.view(_ID_DTYPE[rows_AX.element_size()]).numpy()[:, hidden:]
    return ids_AK


def _invert(permutation: Ints) -> Ints:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(permutation.size)
    return inverse
