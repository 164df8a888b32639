"""Steps of decodes and prompt chunks together, as CUDA graphs over both of their ladders.

One after the other, decodes and chunks each read all experts' weights: at these sizes that is most of what a
step takes. Together they are read once. The inputs are those that DecodeGraphs and ChunkGraphs keep; a graph
reads both, so nothing else is copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch

from engine.attention.device_plan import DevicePlan
from engine.chunk_graphs import ChunkGraphs
from engine.decode_graphs import DecodeGraphs
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.sequence import Sequence

# Few: every pair of them is a graph. A padding row of a decode costs as much as a row in the experts.
DECODE_LADDER = (16, 64, 128, 192, 256)
CHUNK_LADDER = (128, 256, 512, 1024, 2048)


class MixedGraphs:
    """Runs between the steps of the two others, on the same stream: so its graphs share the memory of the
    chunks'."""

    def __init__(
        self, model: CausalLM, kv_cache: KvCache, decodes: DecodeGraphs, chunks: ChunkGraphs
    ) -> None:
        """Before capture() the same steps run without graphs."""
        self._model = model
        self._kv_cache = kv_cache
        self._decodes = decodes
        self._chunks = chunks
        self._rows = [*(n for n in DECODE_LADDER if n < decodes.max_seqs), decodes.max_seqs]
        self._sizes = [n for n in CHUNK_LADDER if n <= chunks.max_tokens]
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def fits(self, batch: ForwardBatch) -> bool:
        """These chunks, beside any decodes."""
        return self._chunks.fits(batch) and bool(self._sizes) and batch.num_tokens <= self._sizes[-1]

    @torch.inference_mode()
    def launch(
        self,
        seqs: list[Sequence],
        places: Mapping[Sequence, int],
        batch: ForwardBatch,
        num_wanted: int,
    ) -> list[Sequence]:
        """Starts a step of these decodes and these chunks; the rest is as of DecodeGraphs.launch() and
        ChunkGraphs.run()."""
        num_rows = self._rows[bisect_left(self._rows, len(seqs))]
        size = self._sizes[bisect_left(self._sizes, batch.num_tokens)]
        placed = self._decodes.place(seqs, num_rows, places)
        self._chunks.fill(batch, size, num_wanted)
        graph = self._graphs.get((num_rows, size))
        if graph is None:
            self._step(num_rows, size)
        else:
            graph.replay()
        return placed

    def rehearse(self) -> None:
        """Each step of both ladders, for compile_ahead()."""
        for num_rows in reversed(self._rows):
            for size in reversed(self._sizes):
                self._step(num_rows, size)

    def capture(self) -> None:
        """All graphs, on CUDA only. The cache does not change."""
        if self._kv_cache.data.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        for num_rows in reversed(self._rows):
            for size in reversed(self._sizes):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._step(num_rows, size)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._chunks.pool, stream=stream):
                    self._step(num_rows, size)
                self._graphs[num_rows, size] = graph
        torch.cuda.synchronize()
        self._model.take_expert_load()

    @torch.inference_mode()
    def _step(self, num_rows: int, size: int) -> None:
        decodes, chunks = self._decodes.batch(num_rows), self._chunks.batch(size)
        assert decodes.device_plan is not None and chunks.device_plan is not None
        positions_T = torch.cat((decodes.positions_T, chunks.positions_T))
        slots_T = torch.cat((decodes.slot_mapping_T, chunks.slot_mapping_T))
        decode_rows_N = torch.arange(num_rows, device=positions_T.device)
        batch = ForwardBatch(
            token_ids_T=torch.cat((decodes.token_ids_T, chunks.token_ids_T)),
            positions_T=positions_T,
            slot_mapping_T=slots_T,
            num_decodes=num_rows,
            query_start=[],
            context_len=[],
            block_tables=[],
            logits_rows_N=torch.cat((decode_rows_N, chunks.logits_rows_N + num_rows)),
            device_plan=DevicePlan(
                positions_T=positions_T,
                slot_mapping_T=slots_T,
                num_decodes=num_rows,
                block_tables_SB=decodes.device_plan.block_tables_SB,
                context_len_S=decodes.device_plan.context_len_S,
                chunks=chunks.device_plan.chunks,
            ),
        )
        hidden_ND = self._model.forward(batch, self._kv_cache, wanted_N=batch.logits_rows_N)
        self._decodes.finish(num_rows, hidden_ND[:num_rows])
        self._chunks.finish(hidden_ND[num_rows:])
