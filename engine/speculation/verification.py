"""Drafts against what the sampler draws.

A step computes the logits behind a sequence's last token and behind each of its drafts. The sampler draws the
first token from the first of them exactly as it would without drafts. If the draft is that token, the logits
behind it are those of the sequence, and the sampler goes on with the sequence one token longer: penalties,
masks and the position that keys the draw see the token. Else they are of no use.

This is speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) with its
acceptance test made a coupling. Theirs accepts a draft x from q with probability min(1, p(x) / q(x)) and
draws a rejected one anew from the rest of p. Given the draft, q is all on one point: x is accepted with
probability p(x), and else the token is drawn from p without x. To draw from p and compare does both at once.
What comes out is more than distributed alike: it is the same token, because it is drawn with the number of
(seed, position) from the same logits. So what a sequence says depends on no draft, and on no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from engine.batch_rows import SequenceRows
from engine.outputs import TokenLogprobs
from engine.sampler import Sampler
from engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class NewTokens:
    """Of one sequence in one step, in order. Not appended to it yet."""

    seq: Sequence
    draft_ids: list[int] = field(default_factory=list)  # that were checked
    token_ids: list[int] = field(default_factory=list)  # the accepted ones, and one that nobody guessed
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token, or none

    @property
    def num_accepted(self) -> int:
        """Drafts whose KV counts: each was followed by a token that the sequence keeps."""
        return max(0, len(self.token_ids) - 1)

    @property
    def num_rejected(self) -> int:
        return len(self.draft_ids) - self.num_accepted

    def cut(self, num_tokens: int) -> None:
        """Keep the first ones."""
        del self.token_ids[num_tokens:], self.logprobs[num_tokens:]


def single_tokens(
    seqs: list[Sequence], token_ids: list[int], logprobs: list[TokenLogprobs | None]
) -> list[NewTokens]:
    """Of a step without drafts."""
    return [
        NewTokens(seq, token_ids=[token_id], logprobs=[] if logprob is None else [logprob])
        for seq, token_id, logprob in zip(seqs, token_ids, logprobs, strict=True)
    ]


def logits_rows(sampled: list[SequenceRows]) -> list[int]:
    """Rows whose logits verify() wants, in its order: those behind the last token of each sequence, then
    those behind the first draft of each that has one, and so on."""
    rows = []
    for num_drafts in range(_most_drafts(sampled) + 1):
        rows += [
            part.row_of(part.seq.num_tokens - 1 + num_drafts)
            for part in sampled
            if len(part.tail) >= num_drafts
        ]
    return rows


def verify(sampler: Sampler, logits_NV: torch.Tensor, sampled: list[SequenceRows]) -> list[NewTokens]:
    """One or more tokens for each sequence. The first masks were begun before; the logits may be changed."""
    results = [NewTokens(part.seq, part.tail) for part in sampled]
    active = list(results)
    begin = 0
    for num_drafts in range(_most_drafts(sampled) + 1):
        candidates = [result for result in results if len(result.draft_ids) >= num_drafts]
        end = begin + len(candidates)
        rows_NV = logits_NV[begin:end]
        if len(active) < len(candidates):
            chosen = set(active)
            rows_NV = rows_NV[[i for i, result in enumerate(candidates) if result in chosen]]
        with appended(active):
            if num_drafts:
                sampler.begin(result.seq for result in active)
            token_ids, logprobs = sampler.sample(rows_NV, [result.seq for result in active])
        for result, token_id, logprob in zip(active, token_ids, logprobs, strict=True):
            result.token_ids.append(token_id)
            result.logprobs += [] if logprob is None else [logprob]
        active = [
            result
            for result in active
            if len(result.draft_ids) > num_drafts and result.draft_ids[num_drafts] == result.token_ids[-1]
        ]
        begin = end
        if not active:
            break
    return results


@contextmanager
def appended(results: list[NewTokens]) -> Iterator[None]:
    """The sequences have their new tokens for a while."""
    for result in results:
        result.seq.token_ids.extend(result.token_ids)
    try:
        yield
    finally:
        for result in results:
            if result.token_ids:
                del result.seq.token_ids[-len(result.token_ids) :]


def _most_drafts(sampled: list[SequenceRows]) -> int:
    return max((len(part.tail) for part in sampled), default=0)
