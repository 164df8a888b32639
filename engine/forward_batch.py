"""The tensors of one forward pass.

Shape letters here and in the models: T tokens of the batch, S sequences of the batch, D hidden, H heads,
V vocabulary, E logical experts, K experts per token, B blocks, N rows that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.device_plan import DevicePlan


@dataclass(slots=True)
class ForwardBatch:
    """Rows of all sequences packed without padding: the decode rows, each a sequence here, then the chunks.

    Sequence s owns rows query_start[s] .. query_start[s + 1]. Its context is everything in the cache up to
    and with those rows, context_len[s], but for the tokens before first_token. A decoding sequence with
    drafts has several decode rows, each a sequence here with a context that is longer by one.
    """

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64, block_id * block_size + offset of each row; -1: not to be stored
    num_decodes: int  # the first num_decodes sequences have one row each
    query_start: list[int]  # S + 1 entries
    context_len: list[int]  # S entries, tokens
    block_tables: list[list[int]]  # S entries, block ids covering context_len
    logits_rows_N: torch.Tensor  # int64, rows of T whose logits are wanted
    block_tables_SB: torch.Tensor | None = None  # int64, padded with 0: of the decoding sequences
    device_plan: DevicePlan | None = None  # for models whose attention is kernels
    has_unstored_rows: bool = False
    first_token: int = 0

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.context_len)
