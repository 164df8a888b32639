"""What a sequence keeps of speculation from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class DraftState:
    """The layer of multi-token prediction has a row of every computed token. is_ahead: it has the row of the
    token after them too. Else it makes that row in the next step, out of the hidden state of the last
    computed token; where that is not known (a prefix hit, a load) the token is computed once more for it."""

    token_ids: list[int] = field(default_factory=list)  # guesses of what follows the last token
    is_ahead: bool = False
    hidden_D: torch.Tensor | None = None  # of the last computed token, unless is_ahead
