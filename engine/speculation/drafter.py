"""Makes the drafts of the next step, with the layer of multi-token prediction.

Behind the main model's pass the layer computes its rows of the tokens that are new: of a prompt's chunk, of
the accepted drafts, and of the token that was drawn last. What it predicts behind that one is the draft. It
is drawn as the sampler will draw the token itself, with the same penalties and masks and the same random
number: two similar distributions then mostly give the same token.

More drafts come from the same layer, out of its own hidden states and drafts. Those rows are overwritten in
the next step, when the main model has seen the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.batch_rows import SequenceRows
from engine.batch_tensors import BatchTensors
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.models.mtp import FIRST_TOKEN
from engine.sampler import Sampler
from engine.sequence import Sequence
from engine.speculation.draft_state import DraftState
from engine.speculation.handed_draft import HandedDraft, unpack_draft
from engine.speculation.verification import NewTokens, appended


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLimits:
    num_tokens: int  # drafts of a sequence in a step
    max_model_len: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class _Part:
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


class Drafter:
    def __init__(
        self,
        model: CausalLM,
        kv_cache: KvCache,
        sampler: Sampler,
        limits: DraftLimits,
        max_rows: int,
        device: str,
    ) -> None:
        """max_rows: of a pass of the main model."""
        assert model.mtp is not None
        self._model = model
        self._layer = model.mtp
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._limits = limits
        self._block_size = kv_cache.layout.block_size
        self._tensors = BatchTensors(
            2 * max_rows,  # a sequence has at most one row more than in the main model's pass
            self._block_size,
            device,
            uses_kernels=model.uses_kernels,
            first_token=FIRST_TOKEN,
        )

    def draft(
        self, main: list[SequenceRows], num_decoding: int, hidden_TD: torch.Tensor, new: list[NewTokens]
    ) -> None:
        """Sets the draft state of all sequences in `main`, whose first num_decoding have decode rows. With
        expert parallelism every rank calls it in every step: the number of passes is always the same."""
        new_of = {tokens.seq: tokens for tokens in new}
        parts = [self._plan(rows, new_of.get(rows.seq) or NewTokens(rows.seq)) for rows in main]
        made_TD = self._first_pass(parts, num_decoding, hidden_TD)
        for part in parts:
            _note_state(part, hidden_TD)
        drafting = [part for part in parts if part.num_drafts]
        made_TD = made_TD[[part.rows.begin + part.rows.num_rows - 1 for part in drafting]]
        self._choose(drafting, made_TD)
        for _ in range(1, self._limits.num_tokens):
            index = [i for i, part in enumerate(drafting) if self._goes_on(part)]
            drafting = [drafting[i] for i in index]
            made_TD = self._next_pass(drafting, made_TD[index])
            self._choose(drafting, made_TD)

    def unpack(self, handed: HandedDraft, num_tokens: int) -> DraftState:
        """Of a sequence of num_tokens that comes from another engine. ValueError when it does not fit."""
        most = min(self._limits.num_tokens, self._limits.max_model_len - num_tokens - 1)
        return unpack_draft(handed, self._layer.embedding_VD[0], self._model.vocab_size, most)

    def _plan(self, main: SequenceRows, tokens: NewTokens) -> _Part:
        seq = main.seq
        num_computed = main.end_position
        if tokens.token_ids:
            num_computed = seq.num_tokens - 1 + len(tokens.token_ids)
        num_drafts = self._num_drafts(tokens, num_computed)
        first = max(FIRST_TOKEN, seq.num_computed_tokens + seq.draft.is_ahead)
        end = num_computed + (num_drafts > 0)
        rows = SequenceRows(seq, first, max(0, end - first), 0, tokens.token_ids)
        known = NewTokens(seq, token_ids=list(tokens.token_ids))
        return _Part(main, rows, known, num_drafts, seq.draft.hidden_D)

    def _num_drafts(self, tokens: NewTokens, num_computed: int) -> int:
        """How many the next step could use. The first needs a place for the layer's row of the last token."""
        seq, num_new = tokens.seq, len(tokens.token_ids)
        if not num_new or len(seq.block_table) * self._block_size <= num_computed:
            return 0
        if tokens.token_ids[-1] in self._ends(seq):
            return 0
        most = self._limits.num_tokens if seq.matcher is None else 1  # a matcher cannot read guesses
        most = min(most, self._limits.max_model_len - seq.num_tokens - num_new - 1)
        if not seq.keeps_blocks:  # else the receiver goes on
            most = min(most, seq.max_output_tokens - seq.num_output_tokens - num_new - 1)
        return max(0, most)

    def _ends(self, seq: Sequence) -> frozenset[int]:
        """Tokens that nothing follows. They are not drafted."""
        sampling = seq.sampling
        is_eos_ordinary = sampling.ignore_eos and (seq.matcher is None or not seq.matcher.is_open)
        return sampling.stop_token_ids | (frozenset() if is_eos_ordinary else self._limits.eos_token_ids)

    def _first_pass(self, parts: list[_Part], num_decoding: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        placed, sources, carried = [], [], []
        num_rows = 0
        for part in parts:
            part.rows.begin = num_rows
            if not part.rows.num_rows:
                continue
            placed.append(part.rows)
            before = part.main.row_of(part.rows.first - 1)
            if before < part.main.begin:
                assert part.carried_D is not None
                carried.append((num_rows, part.carried_D))
                before = part.main.begin
                sources.append(before)
                sources += range(before, before + part.rows.num_rows - 1)
            else:
                sources += range(before, before + part.rows.num_rows)
            num_rows += part.rows.num_rows
        num_decode_parts = sum(part.rows.num_rows > 0 for part in parts[:num_decoding])
        batch = self._tensors.build(placed, num_decode_parts, [])
        previous_TD = hidden_TD[sources]
        for row, hidden_D in carried:
            previous_TD[row] = hidden_D
        return self._layer.forward(batch, previous_TD, self._kv_cache)

    def _goes_on(self, part: _Part) -> bool:
        """Another draft is wanted, and there is a place for the row of the last one."""
        position = part.rows.end_position
        return (
            len(part.draft_ids) < part.num_drafts and position < len(part.seq.block_table) * self._block_size
        )

    def _next_pass(self, parts: list[_Part], previous_ND: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(parts):
            part.rows = SequenceRows(part.seq, part.rows.end_position, 1, i, part.tokens.token_ids)
        batch = self._tensors.build([part.rows for part in parts], len(parts), [])
        return self._layer.forward(batch, previous_ND, self._kv_cache)

    def _choose(self, parts: list[_Part], made_ND: torch.Tensor) -> None:
        if not parts:
            return
        seqs = [part.seq for part in parts]
        with appended([part.tokens for part in parts]):
            self._sampler.begin(seqs)
            draft_ids = self._sampler.choose(self._model.logits(made_ND), seqs)
        for part, draft_id in zip(parts, draft_ids, strict=True):
            if draft_id in self._ends(part.seq):
                part.num_drafts = 0
            else:
                part.draft_ids.append(draft_id)
                part.tokens.token_ids.append(draft_id)
            part.seq.draft.token_ids = part.draft_ids


def _note_state(part: _Part, hidden_TD: torch.Tensor) -> None:
    state = DraftState(is_ahead=part.num_drafts > 0)
    if not state.is_ahead or part.seq.keeps_blocks:
        num_computed = part.rows.end_position - state.is_ahead
        state.hidden_D = hidden_TD[part.main.row_of(num_computed - 1)].clone()
    part.seq.draft = state
