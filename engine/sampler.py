"""One token for each row of logits. N rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.draw import Truncation, argmax, draw, draw_truncated
from engine.grammar.step_masks import GrammarTimes, MaskComputer
from engine.logits_edits import edit_logits, needs_edits
from engine.logprobs import token_logprobs
from engine.outputs import TokenLogprobs
from engine.philox import uniform
from engine.sequence import Sequence

GREEDY_BELOW = 1e-5  # temperatures below are greedy: dividing by them would overflow


def is_plain(seq: Sequence) -> bool:
    """Nothing but its token is wanted, drawn from the logits as they are: the device can do it."""
    return seq.sampling.num_logprobs is None and not needs_edits(seq)


def is_plain_greedy(seq: Sequence) -> bool:
    """Its token is the likeliest, and nothing else is wanted."""
    return seq.sampling.temperature < GREEDY_BELOW and is_plain(seq)


def is_truncated(seq: Sequence) -> bool:
    sampling = seq.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._masks = MaskComputer()

    def begin(self, seqs: Iterable[Sequence]) -> None:
        """These will be sampled next: what needs no logits is computed beside the forward pass."""
        self._masks.begin(seqs)

    def take_grammar_times(self) -> GrammarTimes:
        return self._masks.take_times()

    def sample(
        self, logits_NV: torch.Tensor, seqs: list[Sequence]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Row n is the next token of seqs[n]; the logits are float32 and may be changed. Sequences with a
        grammar were named to begin(); whoever's grammar failed gets some token. A draw is keyed by
        (seed, position of the new token): the same wherever and whenever this sequence runs."""
        logprob_rows = [row for row, seq in enumerate(seqs) if seq.sampling.num_logprobs is not None]
        raw_MV = logits_NV[logprob_rows] if logprob_rows else None  # a copy
        token_ids = self.choose(logits_NV, seqs)
        logprobs: list[TokenLogprobs | None] = [None] * len(seqs)
        if raw_MV is not None:
            drawn = [token_ids[row] for row in logprob_rows]
            num_top = [seqs[row].sampling.num_logprobs or 0 for row in logprob_rows]
            for row, entry in zip(logprob_rows, token_logprobs(raw_MV, drawn, num_top), strict=True):
                logprobs[row] = entry
        return token_ids, logprobs

    def choose(self, logits_NV: torch.Tensor, seqs: list[Sequence]) -> list[int]:
        """As sample(), without logprobs."""
        if any(map(needs_edits, seqs)):
            edit_logits(logits_NV, seqs, self._eos_token_ids, self._masks.take())
        return self._draw(logits_NV, seqs)

    def _draw(self, logits_NV: torch.Tensor, seqs: list[Sequence]) -> list[int]:
        random_rows = [row for row, seq in enumerate(seqs) if seq.sampling.temperature >= GREEDY_BELOW]
        token_ids = argmax(logits_NV) if len(random_rows) < len(seqs) else [0] * len(seqs)
        truncated = [row for row in random_rows if is_truncated(seqs[row])]
        plain = [row for row in random_rows if not is_truncated(seqs[row])]
        for rows, has_truncation in ((plain, False), (truncated, True)):
            if rows:
                drawn = _draw_rows(logits_NV, seqs, rows, has_truncation)
                for row, token_id in zip(rows, drawn, strict=True):
                    token_ids[row] = token_id
        return token_ids


def _draw_rows(
    logits_NV: torch.Tensor, seqs: list[Sequence], rows: list[int], has_truncation: bool
) -> list[int]:
    device = logits_NV.device
    chosen = [seqs[row] for row in rows]
    params = [seq.sampling for seq in chosen]
    if len(rows) < len(seqs):
        logits_NV = logits_NV[torch.tensor(rows, device=device)]
    temperature_N1 = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
    scaled_NV = (logits_NV - logits_NV.amax(1, keepdim=True)) / temperature_N1
    u = torch.from_numpy(uniform([p.seed for p in params], [seq.num_tokens for seq in chosen])).to(device)
    if not has_truncation:
        plain: list[int] = draw(scaled_NV, u).tolist()
        return plain
    truncation = Truncation(
        torch.tensor([p.top_k for p in params], device=device),
        torch.tensor([p.top_p for p in params], device=device),
        torch.tensor([p.min_p for p in params], device=device),
    )
    tokens: list[int] = draw_truncated(scaled_NV, truncation, u).tolist()
    return tokens
