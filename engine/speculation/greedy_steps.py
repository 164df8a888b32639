"""Decodes with drafts where every token is the likeliest: the device compares by itself, so the next step is
started before anybody reads this one, and the host plans while the device computes.

What comes next goes from buffer to buffer: the tokens behind the rows and the number of right drafts make the
draft layer's rows, and its drafts the main model's next rows. A row that would have no place in the blocks of
its sequence becomes one that is not needed.
"""

from __future__ import annotations

import torch

from engine.batch_rows import SequenceRows
from engine.sequence import Sequence
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.draft_plan import DraftPlanner
from engine.speculation.draft_state import DraftState
from engine.speculation.verification import NewTokens


class GreedyLaunch:
    """A step that was started. By row: the sequences, and how many places their blocks had."""

    def __init__(
        self,
        seqs: list[Sequence],
        limits: list[int],
        results: torch.Tensor,
        done: torch.cuda.Event | None,
    ) -> None:
        """results: on the host once it is done; [N, W tokens behind the rows, right drafts, W - 1 drafts]."""
        self.seqs = seqs
        self.limits = limits
        self.tables = [seq.block_table for seq in seqs]
        self._results = results
        self._done = done

    def read(self) -> list[list[int]]:
        """Waits for it."""
        if self._done is not None:
            self._done.synchronize()
        rows: list[list[int]] = self._results[: len(self.seqs)].tolist()
        return rows


class GreedySteps:
    def __init__(self, graphs: DraftGraphs, planner: DraftPlanner, max_seqs: int) -> None:
        self._graphs = graphs
        self._planner = planner
        self._is_cuda = graphs.hidden_RD.is_cuda
        shape = (3, max_seqs, 2 * graphs.width)  # two can be under way, and the one before is being read
        self._results = torch.zeros(shape, dtype=torch.int64, pin_memory=self._is_cuda)
        self._num_launches = 0
        self._ahead: GreedyLaunch | None = None
        self._next_computed: dict[Sequence, int] = {}  # where the step ahead goes on, by sequence

    @torch.inference_mode()
    def run(self, rows: list[SequenceRows], *, may_run_ahead: bool) -> list[NewTokens]:
        """New tokens; the sequences have their next drafts."""
        part_of = {part.seq: part for part in rows}
        launch = self._take_ahead(part_of)
        if launch is None:
            ordered = self._graphs.run_main(rows)
            launch = self._start([part.seq for part in ordered])
        self._ahead = None
        if may_run_ahead and len(launch.seqs) == len(rows):
            self._ahead = self._start_ahead(launch)
        self._next_computed = {}
        results = launch.read()
        return [
            self._take(part_of[seq], result, limit)
            for seq, result, limit in zip(launch.seqs, results, launch.limits, strict=True)
            if seq in part_of
        ]

    def forget(self) -> None:
        """Another step comes between: what is ahead is of no use."""
        self._ahead = None

    def _take_ahead(self, part_of: dict[Sequence, SequenceRows]) -> GreedyLaunch | None:
        """The step ahead, if it has what all of these need now. It may have more: sequences that ended."""
        ahead = self._ahead
        if ahead is None:
            return None
        held = {
            seq
            for seq, table, limit in zip(ahead.seqs, ahead.tables, ahead.limits, strict=True)
            if table is seq.block_table
            and self._next_computed.get(seq) == seq.num_computed_tokens
            and seq.num_computed_tokens < limit
        }
        return ahead if held >= part_of.keys() else None

    def _start(self, seqs: list[Sequence]) -> GreedyLaunch:
        """Behind the main model's pass."""
        limits = self._graphs.upload_limits(seqs)
        return self._finish_start(seqs, limits)

    def _start_ahead(self, last: GreedyLaunch) -> GreedyLaunch:
        limits = self._graphs.run_main_ahead(last.seqs)
        return self._finish_start(last.seqs, limits)

    def _finish_start(self, seqs: list[Sequence], limits: list[int]) -> GreedyLaunch:
        self._graphs.run_turn(len(seqs))
        self._num_launches += 1
        results = self._results[self._num_launches % 3]
        results[: len(seqs)].copy_(self._graphs.results(len(seqs)), non_blocking=True)
        done = None
        if self._is_cuda:
            done = torch.cuda.Event()
            done.record()
        return GreedyLaunch(list(seqs), limits, results, done)

    def _take(self, part: SequenceRows, result: list[int], limit: int) -> NewTokens:
        """The device may have checked more drafts than were scheduled: those do not count."""
        seq, width = part.seq, self._graphs.width
        num_right = min(result[width], len(part.tail))
        new = NewTokens(seq, part.tail, result[: num_right + 1])
        num_computed = seq.num_computed_tokens + num_right + 1
        draft_part = self._planner.plan(part, new)
        is_ahead = num_computed < limit
        drafts: list[int] = []
        if num_right == result[width] and is_ahead:
            drafts = result[width + 1 :][: self._planner.num_placed(draft_part)]
            self._next_computed[seq] = num_computed
        seq.draft = DraftState(token_ids=drafts, is_ahead=is_ahead)
        return new
