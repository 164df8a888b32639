"""Which rows of a forward pass belong to which sequence."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence


@dataclass(slots=True)
class SequenceRows:
    """Rows begin .. begin + num_rows of the batch: the tokens from position `first` on. Those behind the
    sequence's own are `tail`: drafts, or what was just sampled."""

    seq: Sequence
    first: int
    num_rows: int
    begin: int
    tail: list[int]

    @property
    def end_position(self) -> int:
        return self.first + self.num_rows

    def row_of(self, position: int) -> int:
        return self.begin + position - self.first

    def token_ids(self) -> list[int]:
        num_own = self.seq.num_tokens
        own = self.seq.token_ids[self.first : min(self.end_position, num_own)].tolist()
        num_missing = self.num_rows - len(own)
        if not num_missing:
            return own
        start = max(0, self.first - num_own)
        return own + self.tail[start : start + num_missing]


def main_rows(batch: ScheduledBatch, *, speculates: bool) -> list[SequenceRows]:
    """Rows of the main model, in the order of the batch. With speculation a token is computed once more when
    its hidden state is wanted and not there."""
    rows, begin = [], 0
    for seq, num_scheduled in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
        num_again = int(speculates and needs_hidden(seq))
        num_drafts = max(0, num_scheduled - seq.num_remaining_tokens)
        num_rows = num_scheduled + num_again
        rows.append(
            SequenceRows(
                seq, seq.num_computed_tokens - num_again, num_rows, begin, seq.draft.token_ids[:num_drafts]
            )
        )
        begin += num_rows
    return rows


def needs_hidden(seq: Sequence) -> bool:
    """Whether the hidden state of its last computed token is wanted, and is lost."""
    return bool(seq.num_computed_tokens) and not seq.draft.is_ahead and seq.draft.hidden_D is None
