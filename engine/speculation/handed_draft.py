"""The draft state of a sequence on its way to another engine, with the hand-off."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.speculation.draft_state import DraftState


@dataclass(frozen=True, slots=True)
class HandedDraft:
    token_ids: tuple[int, ...]  # guesses of what follows the first token
    hidden: bytes  # of the last prompt token, in the model's dtype


def pack_draft(state: DraftState) -> HandedDraft | None:
    """None for a sequence whose engine does not speculate."""
    if state.hidden_D is None:
        return None
    hidden = state.hidden_D.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return HandedDraft(tuple(state.token_ids), hidden)


def unpack_draft(handed: HandedDraft, like_D: torch.Tensor, vocab_size: int, max_drafts: int) -> DraftState:
    """like_D: the size, dtype and device of a hidden state. ValueError when the state does not fit."""
    expected = like_D.numel() * like_D.element_size()
    if len(handed.hidden) != expected:
        raise ValueError(f"the hidden state handed over has {len(handed.hidden)} bytes, expected {expected}")
    outside = [token_id for token_id in handed.token_ids if not 0 <= token_id < vocab_size]
    if outside:
        raise ValueError(f"draft {outside[0]} is not in the vocabulary of {vocab_size} tokens")
    hidden_D = torch.frombuffer(bytearray(handed.hidden), dtype=like_D.dtype).to(like_D.device)
    return DraftState(token_ids=list(handed.token_ids[: max(0, max_drafts)]), hidden_D=hidden_D)
