"""A step of decodes, token ids in and token ids out, as CUDA graphs over a ladder of batch sizes.

A launch costs the host microseconds and a step has hundreds of them; a graph costs one. What a graph reads
and writes lies at fixed addresses, so its inputs are copied in, and a batch is padded to the next size of the
ladder: padding rows have position -1, store nothing and attend to nothing.

A token that the step before has found is not known to the host yet. Its row names the place where that step
left it.

N rows, B blocks of a table, V vocabulary, P places of found tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.attention.device_plan import DevicePlan
from engine.decode_rows import DecodeRows
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.sequence import Sequence

_FINE_LADDER = (1, 2, 4, 8, 16, 24, 32, 40, *range(48, 257, 16))
_COARSE_STEP = 64


@dataclass(frozen=True, slots=True)
class GraphLimits:
    max_seqs: int  # of a step of decodes; 0: no graphs of them
    max_model_len: int


class DecodeGraphs:
    """One step after another, on one stream: nobody waits for any of them."""

    def __init__(
        self, model: CausalLM, kv_cache: KvCache, limits: GraphLimits, found_P: torch.Tensor
    ) -> None:
        """found_P: int64, tokens found by the last step; a step here leaves its own, row by row, in the first
        places. Before capture() the same steps run without graphs."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        self._pick = greedy_tokens
        device = kv_cache.data.device
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.layout.block_size
        self.max_seqs = limits.max_seqs
        self._ladder = batch_ladder(limits.max_seqs)
        max_blocks = -(-limits.max_model_len // self._block_size)
        is_cuda = device.type == "cuda"
        self._host = DecodeRows(limits.max_seqs, is_pinned=is_cuda)
        self._uploaded = torch.cuda.Event() if is_cuda else None
        self._found_P = found_P
        # token ids, positions, places of pending tokens; -1: none
        self._rows_3N = torch.full((3, limits.max_seqs), -1, dtype=torch.int64, device=device)
        self._rows_3N[0] = 0
        self._tables_NB = torch.zeros(limits.max_seqs, max_blocks, dtype=torch.int32, device=device)
        # of the last launch, in the dtype of the model
        self.logits_NV = torch.empty(limits.max_seqs, model.vocab_size, dtype=model.dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def launch(self, seqs: list[Sequence], places: Mapping[Sequence, int]) -> list[Sequence]:
        """The sequences in the order of their rows. places: of the pending tokens."""
        num_rows = next(size for size in self._ladder if size >= len(seqs))
        placed = self.place(seqs, num_rows, places)
        graph = self._graphs.get(num_rows)
        if graph is None:
            self._step(num_rows)
        else:
            graph.replay()
        return placed

    def place(self, seqs: list[Sequence], num_rows: int, places: Mapping[Sequence, int]) -> list[Sequence]:
        """Copies the inputs of a step of so many rows in; the sequences in the order of their rows."""
        if self._uploaded is not None:
            self._uploaded.synchronize()  # then the host's buffers may change
        placed = self._host.update(seqs, num_rows, places)
        self._rows_3N.copy_(self._host.rows_3N, non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        self._host.write_tables(self._tables_NB)
        return placed

    def positions(self) -> torch.Tensor:
        """int64 [N], of the rows of the last launch."""
        return self._rows_3N[1]

    def rehearse(self) -> None:
        """Each step of the ladder, for compile_ahead()."""
        for num_rows in reversed(self._ladder):
            self._step(num_rows)

    def capture(self) -> None:
        """All graphs, on CUDA only. The cache does not change."""
        if self._kv_cache.data.device.type != "cuda":
            return
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
        self.finish(num_rows, self._model.forward(self.batch(num_rows), self._kv_cache))

    def finish(self, num_rows: int, hidden_ND: torch.Tensor) -> None:
        """The logits of these rows, and their greedy tokens."""
        logits_NV = self.logits_NV[:num_rows]
        self._model.logits_into(logits_NV, hidden_ND)
        self._pick(logits_NV, self._found_P[:num_rows])

    def batch(self, num_rows: int) -> ForwardBatch:
        """Of the rows that place() fills: views of them, and what follows from them on the device."""
        host_ids_N, positions_N, places_N = self._rows_3N[:, :num_rows].unbind()
        found_N = self._found_P.index_select(0, places_N.clamp(min=0))
        token_ids_N = torch.where(places_N < 0, host_ids_N, found_N)
        tables_NB = self._tables_NB[:num_rows]
        is_padding = positions_N < 0
        columns_N1 = (positions_N // self._block_size).clamp_(min=0).unsqueeze(1)
        blocks_N = tables_NB.gather(1, columns_N1).squeeze(1).to(torch.int64)
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
        return ForwardBatch(
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


def batch_ladder(max_seqs: int) -> list[int]:
    """Ascending, the last one is max_seqs."""
    sizes = [size for size in _FINE_LADDER if size < max_seqs]
    sizes += range(_FINE_LADDER[-1] + _COARSE_STEP, max_seqs, _COARSE_STEP)
    return [*sizes, max_seqs]
