"""Which tokens the grammars of one step allow, computed beside the forward pass.

R rows (one for each sequence whose grammar holds), W bytes: a bit for each token, lowest first, in whole
words of 32 bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLExecutor

    from engine.grammar.matcher import GrammarMatcher
    from engine.sequence import Sequence

Bits = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class GrammarTimes:
    """Of one step."""

    num_masks: int = 0
    mask_s: float = 0.0  # computing them
    wait_s: float = 0.0  # of that, what the forward pass did not hide

    def __add__(self, other: GrammarTimes) -> GrammarTimes:
        return GrammarTimes(
            self.num_masks + other.num_masks, self.mask_s + other.mask_s, self.wait_s + other.wait_s
        )


@dataclass(frozen=True, slots=True)
class StepMasks:
    rows: dict[Sequence, int] = field(default_factory=dict)
    bits_RW: Bits = field(default_factory=lambda: np.zeros((0, 0), dtype=np.uint8))
    mask_s: float = 0.0

    def of(self, seq: Sequence) -> Bits | None:
        row = self.rows.get(seq)
        return None if row is None else self.bits_RW[row]


NO_MASKS = StepMasks()


class MaskComputer:
    """Belongs to the engine thread. Between begin() and take() its own thread reads the sequences, which must
    not change: the engine changes them after the step."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None  # made for the first sequence with a grammar
        self._executor: LLExecutor | None = None
        self._pending: Future[StepMasks] | None = None
        self._masks = NO_MASKS
        self._times = GrammarTimes()

    def begin(self, seqs: Iterable[Sequence]) -> None:
        """Of those that get a token in this step."""
        self.take()  # nobody asked for the last ones
        self._masks = NO_MASKS
        constrained = [seq for seq in seqs if seq.matcher is not None]
        if constrained:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
            self._pending = self._pool.submit(self._compute, constrained)

    def take(self) -> StepMasks:
        """Those of the last begin(); waits for them. As often as somebody asks."""
        if self._pending is not None:
            began = time.monotonic()
            pending, self._pending = self._pending, None
            self._masks = masks = pending.result()
            self._times += GrammarTimes(len(masks.rows), masks.mask_s, time.monotonic() - began)
        return self._masks

    def take_times(self) -> GrammarTimes:
        """Of what was taken since it was last asked."""
        times, self._times = self._times, GrammarTimes()
        return times

    def _compute(self, seqs: list[Sequence]) -> StepMasks:
        began = time.monotonic()
        rows: dict[Sequence, int] = {}
        matchers: list[GrammarMatcher] = []
        for seq in seqs:
            matcher = seq.matcher
            assert matcher is not None
            matcher.follow(seq.token_ids, seq.num_prompt_tokens)
            if matcher.is_open and matcher.error is None:
                rows[seq] = len(matchers)
                matchers.append(matcher)
        if not matchers:
            return NO_MASKS
        bits_RW = np.zeros((len(matchers), matchers[0].num_mask_bytes), dtype=np.uint8)
        self._fill(bits_RW, matchers)
        for seq, row in rows.items():
            _allow_stop_ids(bits_RW[row], seq)
        return StepMasks(rows, bits_RW, time.monotonic() - began)

    def _fill(self, bits_RW: Bits, matchers: list[GrammarMatcher]) -> None:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        num_rows, num_bytes = bits_RW.shape
        work = [(matcher.matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(work, bits_RW.ctypes.data, num_bytes, num_rows)
        for matcher in matchers:
            matcher.check()


def _allow_stop_ids(bits_W: Bits, seq: Sequence) -> None:
    """Where the output may end, it may end with a stop token of the request, too."""
    stop_ids = seq.sampling.stop_token_ids
    matcher = seq.matcher
    assert matcher is not None
    if stop_ids and seq.num_output_tokens >= seq.sampling.min_tokens and matcher.may_end:
        for token_id in stop_ids:
            bits_W[token_id >> 3] |= 1 << (token_id & 7)
