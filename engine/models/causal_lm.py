"""What the runner may ask of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from engine.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from engine.kv_cache import KvCache
    from engine.models.mtp import MtpLayer


class LayerDone(Protocol):
    def __call__(self, layer: int, computed: torch.cuda.Event | None = None) -> None:
        """On CUDA the layer's KV is computed when `computed` is reached, or, without it, when everything that
        was launched so far is done."""
        ...


class CausalLM(Protocol):
    vocab_size: int
    dtype: torch.dtype
    mtp: MtpLayer | None  # drafts tokens; one more layer of the cache
    uses_kernels: bool  # a batch must come with a DevicePlan, and a step of decodes can be a CUDA graph

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        layer_done: LayerDone | None = None,
        *,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_TD after the final norm; with wanted_N (int64, rows of T) hidden_ND of these, in that order.
        Behind the last attention nothing is computed for the others then, but in a group of ranks, which have
        agreed on the rows of a pass. Calls layer_done(i) when layer i's KV of this batch is in the cache.
        Zero tokens are an idle step: it joins every dispatch and combine."""
        ...

    def one_layer_of_each_kind(self) -> AbstractContextManager[None]:
        """Inside, forward() leaves out layers that launch the same kernels as another one."""
        ...

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]."""
        ...

    def logits_into(self, out_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """As logits(), into a tensor of the model's dtype."""
        ...

    def take_expert_load(self) -> torch.Tensor | None:
        """int64 [MoE layers, E]: tokens of this rank routed to each logical expert since the last call. The
        last layer is that of multi-token prediction, if there is one. A layer that computes only wanted rows
        does not count them: mostly they are ends of prompts, which choose alike."""
        ...
