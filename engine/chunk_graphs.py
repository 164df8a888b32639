"""Prompt chunks as CUDA graphs over a ladder of token counts: launching the kernels of a chunk takes the host
longer than computing up to 4096 tokens takes the device, and leaves it no time for anything else.

A graph has room for a few chunks and for any division of its tokens among them. Padding rows belong to no
chunk, store nothing, and their attention is 0. What the cache holds of the chunks' sequences before them has
a fixed room too, and any division of it: how much it is, and where, is read on the device.

T tokens, S chunks, B blocks of a table, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.device_plan import ChunkRows, DevicePlan, PagedContext
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM, LayerDone
from engine.uploads import upload

LADDER = (
    *(64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048),
    *(2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
)
MAX_CHUNKS = 16
MAX_CACHED_ROWS = 16384  # of all chunks: 8 KB each for expanded keys and values in DeepSeek-V2-Lite's shape
_LAYERS_PER_EVENT = 4  # KV of so many layers can leave while the next ones are computed


def chunk_ladder(token_budget: int) -> list[int]:
    """Sizes of graphs; the last one is the budget, unless that is very large or very small."""
    sizes = [size for size in LADDER if size <= token_budget]
    if sizes and sizes[-1] < token_budget < LADDER[-1]:
        sizes.append(token_budget)
    return sizes


def has_graph_events() -> bool:
    """Whether an event recorded inside a graph can be waited for outside of it."""
    event, graph, stream = torch.cuda.Event(external=True), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    value = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream):
            value += 1
            event.record()
        graph.replay()
        torch.cuda.Stream().wait_event(event)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class LayerEvents:
    """Records events that a captured graph reaches anew whenever it is replayed, after every few layers.
    Graphs that are replayed one after another share them."""

    def __init__(self, num_layers: int) -> None:
        self._events = [torch.cuda.Event(external=True) for _ in range(0, num_layers, _LAYERS_PER_EVENT)]
        self._num_layers = num_layers

    def __call__(self, layer: int, computed: torch.cuda.Event | None = None) -> None:
        if (layer + 1) % _LAYERS_PER_EVENT == 0 or layer + 1 == self._num_layers:
            self.of(layer).record()

    def of(self, layer: int) -> torch.cuda.Event:
        """The first one behind the layer."""
        return self._events[layer // _LAYERS_PER_EVENT]


class ChunkGraphs:
    """One batch after another: the logits of a run are good until the next run."""

    def __init__(self, model: CausalLM, kv_cache: KvCache, token_budget: int, found_S: torch.Tensor) -> None:
        """found_S: int64, where a run leaves the greedy tokens of the wanted rows. Before capture() the same
        steps run without graphs."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        self._pick = greedy_tokens
        self._found_S = found_S[:MAX_CHUNKS]
        device = kv_cache.data.device
        self._model = model
        self._kv_cache = kv_cache
        self._ladder = chunk_ladder(token_budget)
        most = self._ladder[-1] if self._ladder else 0
        self._rows_3T = torch.zeros(3, most, dtype=torch.int64, device=device)  # ids, positions, slots
        self._rows_3T[2] = -1
        self._starts_2S = torch.zeros(2, MAX_CHUNKS + 1, dtype=torch.int32, device=device)  # rows, cached
        self._block_size = kv_cache.layout.block_size
        max_blocks = -(-MAX_CACHED_ROWS // self._block_size)
        self._tables_SB = torch.zeros(MAX_CHUNKS, max_blocks, dtype=torch.int32, device=device)
        self._wanted_S = torch.zeros(MAX_CHUNKS, dtype=torch.int64, device=device)
        self._logits_SV = torch.zeros(MAX_CHUNKS, model.vocab_size, dtype=model.dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._layer_events: LayerEvents | None = None
        if device.type == "cuda" and has_graph_events():
            self._layer_events = LayerEvents(kv_cache.layout.num_layers)

    def fits(self, batch: ForwardBatch) -> bool:
        plan = batch.device_plan
        return (
            plan is not None
            and plan.chunks is not None
            and plan.num_decodes == 0
            and batch.num_seqs <= MAX_CHUNKS
            and sum(batch.context_len) - batch.num_tokens <= MAX_CACHED_ROWS
            and bool(self._ladder)
            and batch.num_tokens <= self._ladder[-1]
        )

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, num_wanted: int) -> torch.Tensor:
        """Logits [num_wanted, V] of the first of the batch's logits rows, in the model's dtype."""
        size = next(size for size in self._ladder if size >= batch.num_tokens)
        self.fill(batch, size, num_wanted)
        graph = self._graphs.get(size)
        if graph is None:
            self._step(size)
        else:
            graph.replay()
        return self.logits(num_wanted)

    @property
    def max_tokens(self) -> int:
        return self._ladder[-1] if self._ladder else 0

    def fill(self, batch: ForwardBatch, size: int, num_wanted: int) -> None:
        """Copies the inputs of a step of so many tokens in, for the logits of num_wanted rows."""
        num_tokens = batch.num_tokens
        self._rows_3T[0, :num_tokens] = batch.token_ids_T
        self._rows_3T[1, :num_tokens] = batch.positions_T
        self._rows_3T[2, :num_tokens] = batch.slot_mapping_T
        self._rows_3T[2, num_tokens:size] = -1
        self._fill_chunks(batch)
        self._wanted_S.zero_()  # what a larger run wanted may be no row of this one
        self._wanted_S[:num_wanted] = batch.logits_rows_N[:num_wanted]

    def _fill_chunks(self, batch: ForwardBatch) -> None:
        device, num_seqs = self._tables_SB.device, batch.num_seqs
        starts = np.zeros((2, MAX_CHUNKS + 1), dtype=np.int32)
        starts[0] = batch.num_tokens
        starts[0, : num_seqs + 1] = batch.query_start
        num_cached = np.array(batch.context_len) - np.diff(batch.query_start)
        starts[1, 1 : num_seqs + 1] = np.cumsum(num_cached)
        starts[1, num_seqs:] = starts[1, num_seqs]
        self._starts_2S.copy_(upload(starts, device))
        num_blocks = -(-num_cached // self._block_size)
        if width := int(num_blocks.max()):
            tables = np.zeros((num_seqs, width), dtype=np.int32)
            for row, table, num in zip(tables, batch.block_tables, num_blocks, strict=True):
                row[:num] = table[:num]
            self._tables_SB[:num_seqs, :width].copy_(upload(tables, device))

    def logits(self, num_wanted: int) -> torch.Tensor:
        return self._logits_SV[:num_wanted]

    def computed(self, layer: int) -> torch.cuda.Event | None:
        """Reached when the layer of the last run is. None: nobody knows before its end."""
        return None if self._layer_events is None else self._layer_events.of(layer)

    def rehearse(self) -> None:
        """Each step of the ladder, for compile_ahead()."""
        for size in reversed(self._ladder):
            self._step(size)

    def capture(self) -> None:
        """All graphs, on CUDA only. The cache does not change."""
        if self._kv_cache.data.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        for size in reversed(self._ladder):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                self._step(size, self._layer_events)
            self._graphs[size] = graph
        torch.cuda.synchronize()
        self._model.take_expert_load()

    @torch.inference_mode()
    def _step(self, size: int, layer_done: LayerDone | None = None) -> None:
        batch = self.batch(size)
        self.finish(self._model.forward(batch, self._kv_cache, layer_done, wanted_N=batch.logits_rows_N))

    def finish(self, hidden_SD: torch.Tensor) -> None:
        """The logits of the wanted rows, and their greedy tokens."""
        self._model.logits_into(self._logits_SV, hidden_SD)
        self._pick(self._logits_SV, self._found_S)

    def batch(self, size: int) -> ForwardBatch:
        """Of the rows that fill() fills."""
        token_ids_T, positions_T, slots_T = self._rows_3T[:, :size].unbind()
        query_start, cached_start = self._starts_2S.unbind()
        plan = DevicePlan(
            positions_T=positions_T,
            slot_mapping_T=slots_T,
            num_decodes=0,
            block_tables_SB=torch.empty(0, 1, dtype=torch.int32, device=token_ids_T.device),
            context_len_S=torch.empty(0, dtype=torch.int32, device=token_ids_T.device),
            chunks=ChunkRows(
                query_start, query_start, PagedContext(cached_start, self._tables_SB, MAX_CACHED_ROWS)
            ),
        )
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_mapping_T=slots_T,
            num_decodes=0,
            query_start=[],
            context_len=[],
            block_tables=[],
            logits_rows_N=self._wanted_S,
            device_plan=plan,
        )
