"""How many drafts a sequence gets, which rows the draft layer computes for them, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.batch_rows import SequenceRows
from engine.models.mtp import FIRST_TOKEN
from engine.sequence import Sequence
from engine.speculation.draft_state import DraftState
from engine.speculation.verification import NewTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLimits:
    num_tokens: int  # drafts of a sequence in a step
    max_model_len: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class DraftPart:
    """One sequence: its rows in the main model's pass and what the layer makes of them."""

    main: SequenceRows
    rows: SequenceRows
    tokens: NewTokens  # the new ones, then drafts
    num_drafts: int  # wanted
    carried_D: torch.Tensor | None  # hidden state of the token before the main rows
    draft_ids: list[int] = field(default_factory=list)

    @property
    def seq(self) -> Sequence:
        return self.main.seq

    def keep_state(self, hidden_TD: torch.Tensor) -> None:
        """hidden_TD: of the main model's pass."""
        state = DraftState(is_ahead=self.num_drafts > 0)
        if not state.is_ahead or self.seq.keeps_blocks:
            num_computed = self.rows.end_position - state.is_ahead
            state.hidden_D = hidden_TD[self.main.row_of(num_computed - 1)].clone()
        self.seq.draft = state


class DraftPlanner:
    def __init__(self, limits: DraftLimits, block_size: int) -> None:
        self.limits = limits
        self._block_size = block_size

    def plan(self, main: SequenceRows, tokens: NewTokens) -> DraftPart:
        """After the main model's pass; `tokens` are what it gave, if anything."""
        seq = main.seq
        num_computed = main.end_position
        if tokens.token_ids:
            num_computed = seq.num_tokens - 1 + len(tokens.token_ids)
        num_drafts = self._num_drafts(tokens, num_computed)
        first = max(FIRST_TOKEN, seq.num_computed_tokens + seq.draft.is_ahead)
        end = num_computed + (num_drafts > 0)
        rows = SequenceRows(seq, first, end - first, 0, tokens.token_ids)
        known = NewTokens(seq, token_ids=list(tokens.token_ids))
        return DraftPart(main, rows, known, num_drafts, seq.draft.hidden_D)

    def take(self, part: DraftPart, draft_id: int) -> None:
        """The next draft. One that nothing follows is the end of them, and none."""
        if draft_id in self._ends(part.seq):
            part.num_drafts = 0
        if len(part.draft_ids) < part.num_drafts:
            part.draft_ids.append(draft_id)
            part.tokens.token_ids.append(draft_id)
        part.seq.draft.token_ids = part.draft_ids

    def goes_on(self, part: DraftPart) -> bool:
        """Another draft is wanted, and there is a place for the row of the last one."""
        has_place = part.rows.end_position < len(part.seq.block_table) * self._block_size
        return len(part.draft_ids) < part.num_drafts and has_place

    def num_placed(self, part: DraftPart) -> int:
        """Of the drafts wanted: each but the first needs a place for the row of the one before it."""
        num_places = len(part.seq.block_table) * self._block_size - part.rows.end_position
        return min(part.num_drafts, 1 + max(0, num_places))

    def _num_drafts(self, tokens: NewTokens, num_computed: int) -> int:
        """How many the next step could use. The first needs a place for the layer's row of the last token."""
        seq, num_new = tokens.seq, len(tokens.token_ids)
        if not num_new or len(seq.block_table) * self._block_size <= num_computed:
            return 0
        if tokens.token_ids[-1] in self._ends(seq):
            return 0
        most = self.limits.num_tokens if seq.matcher is None else 1  # a matcher cannot read guesses
        most = min(most, self.limits.max_model_len - seq.num_tokens - num_new - 1)
        if not seq.keeps_blocks:  # else the receiver goes on
            most = min(most, seq.max_output_tokens - seq.num_output_tokens - num_new - 1)
        return max(0, most)

    def _ends(self, seq: Sequence) -> frozenset[int]:
        """Tokens that nothing follows."""
        sampling = seq.sampling
        is_eos_ordinary = sampling.ignore_eos and (seq.matcher is None or not seq.matcher.is_open)
        return sampling.stop_token_ids | (frozenset() if is_eos_ordinary else self.limits.eos_token_ids)
