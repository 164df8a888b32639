"""A step of decodes, token ids in and token ids out, as CUDA graphs over a ladder of batch sizes.

A launch costs the host microseconds and a step has hundreds of them; a graph costs one. What a graph reads
and writes lies at fixed addresses, so its inputs are copied in, and a batch is padded to the next size of the
ladder: padding rows have position -1, store nothing and attend to nothing.

N rows, B blocks of a table, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.device_plan import DevicePlan
from engine.decode_rows import DecodeRows
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.sequence import Sequence

_FINE_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_COARSE_STEP = 64


@dataclass(frozen=True, slots=True)
class GraphLimits:
    max_seqs: int
    max_model_len: int


class DecodeGraphs:
    """Steps are one after another: launch(), then the results, then the next launch()."""

    def __init__(self, model: CausalLM, kv_cache: KvCache, limits: GraphLimits) -> None:
        """Captures all graphs; off CUDA the same step runs without them. The cache does not change."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        self._pick = greedy_tokens
        device = kv_cache.data.device
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.layout.block_size
        self._ladder = batch_ladder(limits.max_seqs)
        max_blocks = -(-limits.max_model_len // self._block_size)
        is_cuda = device.type == "cuda"
        self._host = DecodeRows(limits.max_seqs, max_blocks, is_pinned=is_cuda)
        self._tokens_2N = torch.full((2, limits.max_seqs), -1, dtype=torch.int64, device=device)
        self._tokens_2N[0] = 0
        self._tables_NB = torch.zeros(limits.max_seqs, max_blocks, dtype=torch.int32, device=device)
        self._logits_NV = torch.empty(
            limits.max_seqs, model.vocab_size, dtype=kv_cache.data.dtype, device=device
        )
        self._next_N = torch.zeros(limits.max_seqs, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if is_cuda:
            self._capture()

    @torch.inference_mode()
    def launch(self, seqs: list[Sequence]) -> list[Sequence]:
        """Starts the step; the sequences in the order of the results."""
        num_rows = next(size for size in self._ladder if size >= len(seqs))
        placed, has_changed = self._host.update(seqs, num_rows)
        self._tokens_2N.copy_(self._host.tokens_2N, non_blocking=True)
        if has_changed:
            num_seqs = len(placed)
            self._tables_NB[:num_seqs].copy_(self._host.tables_NB[:num_seqs], non_blocking=True)
        graph = self._graphs.get(num_rows)
        if graph is None:
            self._step(num_rows)
        else:
            graph.replay()
        return placed

    def likeliest(self, num_seqs: int) -> list[int]:
        """The greedy tokens of the last launch. Waits for it."""
        token_ids: list[int] = self._next_N[:num_seqs].tolist()
        return token_ids

    def logits(self, num_seqs: int) -> torch.Tensor:
        """float32 [num_seqs, V] of the last launch, a copy."""
        return self._logits_NV[:num_seqs].to(torch.float32, copy=True)

    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for num_rows in reversed(self._ladder):  # the largest first: the others fit in its memory
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(num_rows)  # compiles kernels, picks algorithms
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._step(num_rows)
            self._graphs[num_rows] = graph
        torch.cuda.synchronize()
        self._model.take_expert_load()

    @torch.inference_mode()
    def _step(self, num_rows: int) -> None:
        token_ids_N, positions_N = self._tokens_2N[:, :num_rows].unbind()
        tables_NB = self._tables_NB[:num_rows]
        is_padding = positions_N < 0
        places_N1 = (positions_N // self._block_size).clamp_(min=0).unsqueeze(1)
        blocks_N = tables_NB.gather(1, places_N1).squeeze(1).to(torch.int64)
        slots_N = blocks_N * self._block_size + positions_N % self._block_size
        slots_N.masked_fill_(is_padding, -1)
        plan = DevicePlan(
            positions_T=positions_N,
            slot_mapping_T=slots_N,
            num_decodes=num_rows,
            block_tables_SB=tables_NB,
            context_len_S=(positions_N + 1).to(torch.int32),
            chunks=None,
        )
        batch = ForwardBatch(
            token_ids_T=token_ids_N,
            positions_T=positions_N,
            slot_mapping_T=slots_N,
            num_decodes=num_rows,
            query_start=[],
            context_len=[],
            block_tables=[],
            logits_rows_N=token_ids_N,
            device_plan=plan,
        )
        logits_NV = self._logits_NV[:num_rows]
        self._model.logits_into(logits_NV, self._model.forward(batch, self._kv_cache))
        self._pick(logits_NV, self._next_N[:num_rows])


def batch_ladder(max_seqs: int) -> list[int]:
    """Ascending, the last one is max_seqs."""
    sizes = [size for size in _FINE_LADDER if size < max_seqs]
    sizes += range(_FINE_LADDER[-1] + _COARSE_STEP, max_seqs, _COARSE_STEP)
    return [*sizes, max_seqs]
