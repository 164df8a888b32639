"""Makes the drafts of the next step, with the layer of multi-token prediction.

Behind the main model's pass the layer computes its rows of the tokens that are new: of a prompt's chunk, of
the accepted drafts, and of the token that was drawn last. What it predicts behind that one is the draft. It
is drawn as the sampler will draw the token itself, with the same penalties and masks and the same random
number: two similar distributions then mostly give the same token.

More drafts come from the same layer, out of its own hidden states and drafts. Those rows are overwritten in
the next step, when the main model has seen the tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.batch_rows import SequenceRows
from engine.batch_tensors import BatchTensors
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.models.mtp import FIRST_TOKEN
from engine.sampler import Sampler
from engine.speculation.draft_plan import DraftLimits, DraftPart, DraftPlanner
from engine.speculation.draft_state import DraftState
from engine.speculation.handed_draft import HandedDraft, unpack_draft
from engine.speculation.verification import NewTokens, appended


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
        self.planner = DraftPlanner(limits, kv_cache.layout.block_size)
        self.recount: Callable[[int], None] = lambda num_rows: None  # tells a group what a pass has
        self._model = model
        self._layer = model.mtp
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._limits = limits
        self._tensors = BatchTensors(
            2 * max_rows,  # a sequence has at most one row more than in the main model's pass
            kv_cache.layout.block_size,
            device,
            uses_kernels=model.uses_kernels,
            first_token=FIRST_TOKEN,
        )

    def unpack(self, handed: HandedDraft, num_tokens: int) -> DraftState:
        """Of a sequence of num_tokens that comes from another engine. ValueError when it does not fit."""
        most = min(self._limits.num_tokens, self._limits.max_model_len - num_tokens - 1)
        return unpack_draft(handed, self._layer.embedding_VD[0], self._model.vocab_size, most)

    def draft(
        self, main: list[SequenceRows], num_decoding: int, hidden_TD: torch.Tensor, new: list[NewTokens]
    ) -> None:
        """Sets the draft state of all sequences in `main`, whose first num_decoding have decode rows. With
        expert parallelism every rank calls it in every step: the number of passes is always the same."""
        new_of = {tokens.seq: tokens for tokens in new}
        parts = [self.planner.plan(rows, new_of.get(rows.seq) or NewTokens(rows.seq)) for rows in main]
        made_TD = self._first_pass(parts, num_decoding, hidden_TD)
        for part in parts:
            part.keep_state(hidden_TD)
        drafting = [part for part in parts if part.num_drafts]
        made_TD = made_TD[[part.rows.begin + part.rows.num_rows - 1 for part in drafting]]
        self._choose(drafting, made_TD)
        for _ in range(1, self._limits.num_tokens):
            index = [i for i, part in enumerate(drafting) if self.planner.goes_on(part)]
            drafting = [drafting[i] for i in index]
            made_TD = self._next_pass(drafting, made_TD[index])
            self._choose(drafting, made_TD)

    def _first_pass(self, parts: list[DraftPart], num_decoding: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        placed: list[SequenceRows] = []
        sources: list[int] = []  # rows of hidden_TD
        carried: list[tuple[int, torch.Tensor]] = []
        for part in parts:
            part.rows.begin = len(sources)
            if not part.rows.num_rows:
                continue
            placed.append(part.rows)
            before = part.main.row_of(part.rows.first - 1)
            num_rows = part.rows.num_rows
            if before < part.main.begin:
                assert part.carried_D is not None
                carried.append((part.rows.begin, part.carried_D))
                before, num_rows = before + 1, num_rows - 1
                sources.append(before)  # something: it is replaced
            sources += range(before, before + num_rows)
        num_decode_parts = sum(part.rows.num_rows > 0 for part in parts[:num_decoding])
        batch = self._tensors.build(placed, num_decode_parts, [])
        self.recount(batch.num_tokens)
        previous_TD = hidden_TD[sources]
        for row, hidden_D in carried:
            previous_TD[row] = hidden_D
        return self._layer.forward(batch, previous_TD, self._kv_cache)

    def _next_pass(self, parts: list[DraftPart], previous_ND: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(parts):
            part.rows = SequenceRows(part.seq, part.rows.end_position, 1, i, part.tokens.token_ids)
        batch = self._tensors.build([part.rows for part in parts], len(parts), [])
        self.recount(batch.num_tokens)
        return self._layer.forward(batch, previous_ND, self._kv_cache)

    def _choose(self, parts: list[DraftPart], made_ND: torch.Tensor) -> None:
        if not parts:
            return
        seqs = [part.seq for part in parts]
        with appended([part.tokens for part in parts]):
            self._sampler.begin(seqs)
            draft_ids = self._sampler.choose(self._model.logits(made_ND), seqs)
        for part, draft_id in zip(parts, draft_ids, strict=True):
            self.planner.take(part, draft_id)
