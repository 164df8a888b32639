"""Which rank holds which expert: a pure function of two numbers, so every rank computes the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Contiguous runs of logical experts: the first num_experts % num_ranks ranks hold one more.

    5 experts on 3 ranks: 0 1 | 2 3 | 4. 2 experts on 3 ranks: 0 | 1 | (none).
    """

    num_experts: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_ranks < 1:
            raise ValueError(f"cannot place {self.num_experts} experts on {self.num_ranks} ranks")

    def local_experts(self, rank: int) -> range:
        base, num_larger = divmod(self.num_experts, self.num_ranks)
        start = rank * base + min(rank, num_larger)
        return range(start, start + base + (rank < num_larger))

    @property
    def rank_of_expert(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) for _ in self.local_experts(rank)]
