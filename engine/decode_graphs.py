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
    max_seqs: int  # of a step of decodes; 0: no graphs of them
    max_model_len: int


class DecodeLaunch:
    """A step that was started."""

    def __init__(
        self,
        seqs: list[Sequence],
        positions: list[int],
        results_N: torch.Tensor,
        done: torch.cuda.Event | None,
    ) -> None:
        """seqs and the positions computed, by row; the results are on the host once it is done."""
        self.seqs = seqs
        self.positions = positions
        self._results_N = results_N
        self._done = done
        self._places = {
            seq: (position, seq.block_table) for seq, position in zip(seqs, positions, strict=True)
        }

    def has(self, seq: Sequence) -> bool:
        """Whether what it computed for the sequence is what the sequence needs now, where it needs it."""
        position, table = self._places.get(seq, (-1, None))
        return position == seq.num_computed_tokens and table is seq.block_table

    def token_ids(self) -> list[int]:
        """Greedy, by row. Waits for them."""
        if self._done is not None:
            self._done.synchronize()
        token_ids: list[int] = self._results_N[: len(self.seqs)].tolist()
        return token_ids


class DecodeGraphs:
    """Steps are one after another. Usually the next one is started before anybody reads the tokens of this
    one (run_ahead): the host plans while the device computes."""

    def __init__(self, model: CausalLM, kv_cache: KvCache, limits: GraphLimits) -> None:
        """Captures all graphs; off CUDA the same step runs without them. The cache does not change."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        self._pick = greedy_tokens
        device = kv_cache.data.device
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.layout.block_size
        self.max_seqs = limits.max_seqs
        self._ladder = batch_ladder(limits.max_seqs)
        max_blocks = -(-limits.max_model_len // self._block_size)
        self._is_cuda = is_cuda = device.type == "cuda"
        self._host = DecodeRows(limits.max_seqs, max_blocks, is_pinned=is_cuda)
        # Two launches can be under way, and the one before is being read.
        self._results_3N = torch.zeros(3, limits.max_seqs, dtype=torch.int64, pin_memory=is_cuda)
        self._num_launches = 0
        self._uploaded: torch.cuda.Event | None = None
        self._ahead: DecodeLaunch | None = None
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
    def launch(self, seqs: list[Sequence]) -> DecodeLaunch:
        """Starts the step from what the host knows."""
        num_rows = next(size for size in self._ladder if size >= len(seqs))
        placed = self.place(seqs, num_rows)
        return self._start(placed, [seq.num_computed_tokens for seq in placed])

    def place(self, seqs: list[Sequence], num_rows: int) -> list[Sequence]:
        """Copies the inputs of a step of so many rows in; the sequences in the order of their rows."""
        self._ahead = None
        self._wait_for_upload()
        placed, has_changed = self._host.update(seqs, num_rows)
        self._tokens_2N.copy_(self._host.tokens_2N, non_blocking=True)
        if has_changed:
            self._upload_tables(len(placed))
        self._uploaded = self._event()
        return placed

    def launched(self, placed: list[Sequence], positions: list[int]) -> DecodeLaunch:
        """Behind the start of a step that ends in finish(): its tokens are copied out."""
        num_seqs = len(placed)
        self._num_launches += 1
        results_N = self._results_3N[self._num_launches % 3]
        results_N[:num_seqs].copy_(self._next_N[:num_seqs], non_blocking=True)
        return DecodeLaunch(placed, positions, results_N, self._event())

    @torch.inference_mode()
    def run_ahead(self, last: DecodeLaunch) -> None:
        """Starts the step after `last`, the latest launch: its tokens go in without a way over the host.
        Nothing happens if a sequence lacks the place of its next token."""
        num_seqs = len(last.seqs)
        if any(
            len(seq.block_table) * self._block_size <= position + 1
            for seq, position in zip(last.seqs, last.positions, strict=True)
        ):
            return
        self._wait_for_upload()
        if self._host.write_tables():
            self._upload_tables(num_seqs)
        self._tokens_2N[0, :num_seqs] = self._next_N[:num_seqs]
        self._tokens_2N[1, :num_seqs] += 1
        self._ahead = self._start(last.seqs, [position + 1 for position in last.positions])

    def take_ahead(self, seqs: list[Sequence]) -> DecodeLaunch | None:
        """The step that was run ahead, if some of seqs are in it; those that are not need a launch()."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not any(ahead.has(seq) for seq in seqs):
            return None
        return ahead

    def logits(self, num_seqs: int) -> torch.Tensor:
        """float32 [num_seqs, V] of the last launch, a copy."""
        return self._logits_NV[:num_seqs].to(torch.float32, copy=True)

    def _wait_for_upload(self) -> None:
        """Then the host's buffers may change."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def _upload_tables(self, num_rows: int) -> None:
        self._tables_NB[:num_rows].copy_(self._host.tables_NB[:num_rows], non_blocking=True)
        self._uploaded = self._event()

    def _start(self, placed: list[Sequence], positions: list[int]) -> DecodeLaunch:
        num_rows = next(size for size in self._ladder if size >= len(placed))
        graph = self._graphs.get(num_rows)
        if graph is None:
            self._step(num_rows)
        else:
            graph.replay()
        return self.launched(placed, positions)

    def _event(self) -> torch.cuda.Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

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
        self.finish(num_rows, self._model.forward(self.batch(num_rows), self._kv_cache))

    def finish(self, num_rows: int, hidden_ND: torch.Tensor) -> None:
        """The logits of these rows, and their greedy tokens."""
        logits_NV = self._logits_NV[:num_rows]
        self._model.logits_into(logits_NV, hidden_ND)
        self._pick(logits_NV, self._next_N[:num_rows])

    def batch(self, num_rows: int) -> ForwardBatch:
        """Of the rows that place() fills: views of them, and what follows from them on the device."""
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
