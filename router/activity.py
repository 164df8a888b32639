"""The last moments in detail, for whoever watches /ui; nothing is kept while nobody does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from proto.link_pb2 import RequestTimings

_MAX_SAMPLES = 4096  # between two looks; at higher rates the latest ones stand for all


@dataclass(slots=True)
class Leg:
    """First tokens that took one way in one period."""

    num_sequences: int = 0
    num_hit_tokens: int = 0
    num_prompt_tokens: int = 0
    transfer_bytes: int = 0


class Activity:
    def __init__(self) -> None:
        self.is_watched = False
        self._ttft_s: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._tpot_s: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._legs: dict[tuple[str, str], Leg] = {}

    def first_token(self, ttft_s: float) -> None:
        if self.is_watched:
            self._ttft_s.append(ttft_s)

    def sequence_ended(self, tpot_s: float) -> None:
        if self.is_watched:
            self._tpot_s.append(tpot_s)

    def took_route(self, decode_id: str, timings: RequestTimings, num_prompt_tokens: int) -> None:
        """The first token came this way. Pairs of workers bound how many ways there are."""
        if not self.is_watched:
            return
        leg = self._legs.setdefault((timings.prefill_worker_id, decode_id), Leg())
        leg.num_sequences += 1
        leg.num_hit_tokens += timings.num_hit_tokens
        leg.num_prompt_tokens += num_prompt_tokens
        leg.transfer_bytes += timings.transfer_bytes

    def take(self) -> tuple[list[float], list[float], dict[tuple[str, str], Leg]]:
        """TTFTs and TPOTs in seconds, and the ways taken, since the last call."""
        taken = (list(self._ttft_s), list(self._tpot_s), self._legs)
        self._ttft_s.clear()
        self._tpot_s.clear()
        self._legs = {}
        return taken
