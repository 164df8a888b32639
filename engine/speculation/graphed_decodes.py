"""Decodes with drafts, by DraftGraphs: what Drafter and verify() do, with two launches in place of hundreds.

Only for sequences that are in the middle of it: the draft layer has the row of their last token.
"""

from __future__ import annotations

from engine.batch_rows import SequenceRows
from engine.sampler import Sampler, is_plain_greedy
from engine.sequence import Sequence
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.draft_plan import DraftPart, DraftPlanner
from engine.speculation.draft_state import DraftState
from engine.speculation.greedy_steps import GreedySteps
from engine.speculation.verification import NewTokens, appended, logits_rows, verify


class GraphedDecodes:
    """start(), verify() and finish() in each step that has such sequences; collect() before the next step."""

    def __init__(self, graphs: DraftGraphs, planner: DraftPlanner, sampler: Sampler, max_seqs: int) -> None:
        self._graphs = graphs
        self._planner = planner
        self._sampler = sampler
        self._greedy_steps = GreedySteps(graphs, planner, max_seqs)
        self._rows: list[SequenceRows] = []
        self._parts: list[DraftPart] = []
        self._awaited: dict[int, DraftState] = {}  # by number of the sequence in the passes

    @staticmethod
    def can_run(seq: Sequence) -> bool:
        return seq.draft.is_ahead and seq.num_remaining_tokens == 1 and not seq.wants_prompt_logprobs

    def run_greedily(self, rows: list[SequenceRows]) -> list[NewTokens]:
        """A whole step of plain greedy sequences, in place of the other calls. The next one is started too,
        if some sequence goes on."""
        goes_on = any(
            part.seq.num_output_tokens + self._graphs.width < part.seq.max_output_tokens for part in rows
        )
        return self._greedy_steps.run(rows, may_run_ahead=goes_on)

    def start(self, rows: list[SequenceRows]) -> None:
        self._greedy_steps.forget()
        self._rows = self._graphs.run_main(rows)

    def verify(self) -> list[NewTokens]:
        """Waits for the main model's pass, and starts the draft layer's."""
        rows = self._rows
        if all(is_plain_greedy(part.seq) for part in rows):
            next_ids = self._graphs.next_ids(len(rows))
            new = [_greedy(part, next_ids) for part in rows]
        else:
            new = verify(self._sampler, self._graphs.logits(logits_rows(rows)), rows)
        self._parts = [self._planner.plan(part, tokens) for part, tokens in zip(rows, new, strict=True)]
        self._graphs.run_drafts([part.rows for part in self._parts])
        for part in self._parts:
            part.keep_state(self._graphs.hidden_RD)
        return new

    def finish(self) -> None:
        """The sequences have their drafts. Those of plain greedy ones are of the right number, and get their
        ids in collect(): the layer's pass goes on while the host plans the next step."""
        parts, self._parts = self._parts, []
        drawing = [n for n, part in enumerate(parts) if part.num_drafts and not is_plain_greedy(part.seq)]
        if drawing:
            self._draw(parts, drawing)
        self._awaited = {
            n: part.seq.draft for n, part in enumerate(parts) if part.num_drafts and is_plain_greedy(part.seq)
        }
        for n, state in self._awaited.items():
            state.token_ids = [0] * self._planner.num_placed(parts[n])

    def collect(self) -> None:
        """Waits for the draft layer's passes of the last step."""
        if self._awaited:
            drafts_KN = self._graphs.drafts(1 + max(self._awaited))
            for n, state in self._awaited.items():
                state.token_ids = [drafts_KN[k][n] for k in range(len(state.token_ids))]
        self._awaited = {}

    def _draw(self, parts: list[DraftPart], drawing: list[int]) -> None:
        """One draft each: later ones would follow a likeliest token, not the one drawn."""
        seqs = [parts[n].seq for n in drawing]
        with appended([parts[n].tokens for n in drawing]):
            self._sampler.begin(seqs)
            drawn = self._sampler.choose(self._graphs.draft_logits(drawing), seqs)
        for n, draft_id in zip(drawing, drawn, strict=True):
            parts[n].num_drafts = 1
            self._planner.take(parts[n], draft_id)


def _greedy(part: SequenceRows, next_ids: list[int]) -> NewTokens:
    """next_ids: by row."""
    row = part.begin
    token_ids = [next_ids[row]]
    for i, draft_id in enumerate(part.tail):
        if draft_id != token_ids[-1]:
            break
        token_ids.append(next_ids[row + i + 1])
    return NewTokens(part.seq, part.tail, token_ids)
