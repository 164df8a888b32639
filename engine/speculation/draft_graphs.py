"""A step of decodes with drafts as CUDA graphs: one of the main model's pass over every sequence's last token
and its drafts, one of the draft layer's passes. Between them the host compares and samples.

Rows are places (sequence, number of the draft): sequence n has rows n * W .. n * W + W - 1 for its last token
and up to W - 1 drafts. The draft layer's row of a place joins the hidden state of that place with the token
that turned out to follow it, so both passes have the same rows. A row that is not needed has position -1,
stores nothing and attends to nothing.

N sequences, W places of each, R = N * W rows, B blocks of a table, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.attention.device_plan import DevicePlan
from engine.batch_rows import SequenceRows
from engine.decode_graphs import GraphLimits, batch_ladder
from engine.decode_rows import DecodeRows
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.models.causal_lm import CausalLM
from engine.models.mtp import FIRST_TOKEN
from engine.sequence import Sequence

IDS, POSITIONS = 0, 1


class DraftGraphs:
    def __init__(self, model: CausalLM, kv_cache: KvCache, limits: GraphLimits, num_drafts: int) -> None:
        """Before capture() the same passes run without graphs."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        assert model.mtp is not None
        self._greedy_tokens = greedy_tokens
        self._model = model
        self._layer = model.mtp
        self._kv_cache = kv_cache
        self._block_size = kv_cache.layout.block_size
        self._num_drafts = num_drafts
        self.width = width = 1 + num_drafts
        device, dtype = kv_cache.data.device, model.dtype
        self._is_cuda = is_cuda = device.type == "cuda"
        most = limits.max_seqs
        self._ladder = batch_ladder(most)
        max_blocks = -(-limits.max_model_len // self._block_size)
        self._host = DecodeRows(most, is_pinned=is_cuda)
        # Rows of ids and positions, and behind them for each sequence its last row and its number of places.
        self._main_host = torch.zeros(2, most, width, dtype=torch.int64, pin_memory=is_cuda)
        self._main = torch.zeros(2, most, width, dtype=torch.int64, device=device)
        self._draft_host = torch.zeros(2, most, width + 1, dtype=torch.int64, pin_memory=is_cuda)
        self._draft = torch.zeros(2, most, width + 1, dtype=torch.int64, device=device)
        self._tables_NB = torch.zeros(most, max_blocks, dtype=torch.int32, device=device)
        hidden_size = self._layer.embedding_VD.shape[1]
        self.hidden_RD = torch.zeros(most * width, hidden_size, dtype=dtype, device=device)
        self._logits_RV = torch.empty(most * width, model.vocab_size, dtype=dtype, device=device)
        self._next_R = torch.zeros(most * width, dtype=torch.int64, device=device)
        self._draft_logits_NV = torch.empty(most, model.vocab_size, dtype=dtype, device=device)
        self._drafts_KN = torch.zeros(num_drafts, most, dtype=torch.int64, device=device)
        self._main_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._draft_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._turn_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Next tokens, right drafts, drafts, as GreedyLaunch reads them.
        self._results = torch.zeros(most, 2 * width, dtype=torch.int64, device=device)
        self._limits_host = torch.zeros(most, dtype=torch.int64, pin_memory=is_cuda)
        self._uploaded: torch.cuda.Event | None = None

    @torch.inference_mode()
    def run_main(self, parts: list[SequenceRows]) -> list[SequenceRows]:
        """Starts the main model's pass over these, whose rows are their last token and drafts. They come back
        in the order of their rows, which are numbered as hidden_RD and logits() are."""
        self._wait_for_upload()
        placed = self._host.update([part.seq for part in parts], len(parts))
        self._host.write_tables(self._tables_NB)
        part_of = {part.seq: part for part in parts}
        ordered = [part_of[seq] for seq in placed]
        rows = self._main_host.numpy()
        size = self._size(len(parts))
        rows[POSITIONS, :size] = -1
        for n, part in enumerate(ordered):
            part.begin = n * self.width
            rows[IDS, n, : part.num_rows] = part.token_ids()
            rows[POSITIONS, n, : part.num_rows] = np.arange(part.first, part.end_position)
        self._main.copy_(self._main_host, non_blocking=True)
        self._note_upload()
        self._run(self._main_graphs, self._main_pass, size)
        return ordered

    def run_main_ahead(self, seqs: list[Sequence]) -> list[int]:
        """Starts the main model's pass over what run_turn() left for these, the sequences of the last pass.
        Their numbers of places now."""
        self._wait_for_upload()
        self._host.write_tables(self._tables_NB)
        limits = self.upload_limits(seqs)
        self._run(self._main_graphs, self._main_pass, self._size(len(seqs)))
        return limits

    def upload_limits(self, seqs: list[Sequence]) -> list[int]:
        """For run_turn(): how many tokens the blocks of each have places for."""
        self._wait_for_upload()
        limits = [len(seq.block_table) * self._block_size for seq in seqs]
        self._limits_host[: len(seqs)] = torch.tensor(limits)
        self._draft[POSITIONS, :, -1].copy_(self._limits_host, non_blocking=True)
        self._note_upload()
        return limits

    def run_turn(self, num_seqs: int) -> None:
        """Starts what a greedy step does behind the main model's pass: compares, drafts, and leaves the rows
        of the next pass and results()."""
        self._run(self._turn_graphs, self._turn_pass, self._size(num_seqs))

    def results(self, num_seqs: int) -> torch.Tensor:
        return self._results[:num_seqs]

    def next_ids(self, num_seqs: int) -> list[int]:
        """The likeliest token behind each row. Waits for them."""
        token_ids: list[int] = self._next_R[: num_seqs * self.width].tolist()
        return token_ids

    def logits(self, rows: list[int]) -> torch.Tensor:
        """float32 [rows, V], a copy."""
        return self._logits_RV[torch.tensor(rows, device=self._logits_RV.device)].float()

    @torch.inference_mode()
    def run_drafts(self, parts: list[SequenceRows]) -> None:
        """Starts the layer's passes over these, in the order of run_main(): part n has one row for each of
        its first places, that follow each other."""
        self._wait_for_upload()
        rows = self._draft_host.numpy()
        size = self._size(len(parts))
        rows[POSITIONS, :size] = -1
        rows[IDS, :size, -1] = 0
        for n, part in enumerate(parts):
            rows[IDS, n, : part.num_rows] = part.token_ids()
            rows[POSITIONS, n, : part.num_rows] = np.arange(part.first, part.end_position)
            rows[IDS, n, -1] = max(0, part.num_rows - 1)
            rows[POSITIONS, n, -1] = len(part.seq.block_table) * self._block_size
        self._draft.copy_(self._draft_host, non_blocking=True)
        self._note_upload()
        self._run(self._draft_graphs, self._draft_pass, size)

    def drafts(self, num_seqs: int) -> list[list[int]]:
        """[place in the draft][sequence], each the likeliest token. Waits for them."""
        drafts: list[list[int]] = self._drafts_KN[:, :num_seqs].tolist()
        return drafts

    def draft_logits(self, sequences: list[int]) -> torch.Tensor:
        """float32 [sequences, V] of the first draft, a copy."""
        return self._draft_logits_NV[torch.tensor(sequences, device=self._draft_logits_NV.device)].float()

    def _wait_for_upload(self) -> None:
        """Then the host's buffers may change."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def _note_upload(self) -> None:
        if self._is_cuda:
            self._uploaded = torch.cuda.Event()
            self._uploaded.record()

    def _size(self, num_seqs: int) -> int:
        return next(size for size in self._ladder if size >= num_seqs)

    def _run(self, graphs: dict[int, torch.cuda.CUDAGraph], step: Callable[[int], None], size: int) -> None:
        graph = graphs.get(size)
        if graph is None:
            step(size)
        else:
            graph.replay()

    @torch.inference_mode()
    def _main_pass(self, num_seqs: int) -> None:
        num_rows = num_seqs * self.width
        ids_R, positions_R = self._main[:, :num_seqs].flatten(1)
        batch = self._batch(ids_R, positions_R, self._row_tables(num_seqs), 0)
        hidden_RD = self._model.forward(batch, self._kv_cache)
        self.hidden_RD[:num_rows] = hidden_RD
        logits_RV = self._logits_RV[:num_rows]
        self._model.logits_into(logits_RV, hidden_RD)
        self._greedy_tokens(logits_RV, self._next_R[:num_rows])

    @torch.inference_mode()
    def _draft_pass(self, num_seqs: int) -> None:
        num_rows = num_seqs * self.width
        ids_R, positions_R = self._draft[:, :num_seqs, : self.width].flatten(1)
        last_N, limit_N = self._draft[:, :num_seqs, self.width]
        tables_NB = self._tables_NB[:num_seqs]
        batch = self._batch(ids_R, positions_R, self._row_tables(num_seqs), FIRST_TOKEN)
        made_RD = self._layer.forward(batch, self.hidden_RD[:num_rows], self._kv_cache)
        row_N = torch.arange(num_seqs, device=last_N.device) * self.width + last_N
        made_ND, position_N = made_RD[row_N], positions_R[row_N]
        logits_NV = self._draft_logits_NV[:num_seqs]
        self._model.logits_into(logits_NV, made_ND)
        self._greedy_tokens(logits_NV, self._drafts_KN[0, :num_seqs])
        for k in range(1, self._num_drafts):
            position_N = torch.where((position_N < 0) | (position_N + 1 >= limit_N), -1, position_N + 1)
            batch = self._batch(self._drafts_KN[k - 1, :num_seqs], position_N, tables_NB, FIRST_TOKEN)
            made_ND = self._layer.forward(batch, made_ND, self._kv_cache)
            more_NV = torch.empty_like(logits_NV)
            self._model.logits_into(more_NV, made_ND)
            self._greedy_tokens(more_NV, self._drafts_KN[k, :num_seqs])

    @torch.inference_mode()
    def _turn_pass(self, num_seqs: int) -> None:
        width = self.width
        ids_NW, positions_NW = self._main[:, :num_seqs]
        next_NW = self._next_R[: num_seqs * width].view(num_seqs, width)
        limit_N1 = self._draft[POSITIONS, :num_seqs, width:]
        first_N1 = positions_NW[:, :1]
        is_right = (next_NW[:, :-1] == ids_NW[:, 1:]) & (positions_NW[:, 1:] >= 0)
        num_right_N1 = is_right.to(torch.int64).cumprod(1).sum(1, keepdim=True)
        place_W = torch.arange(width, device=next_NW.device)
        follows_NW = first_N1 + 1 + place_W
        is_row = (place_W <= num_right_N1) & (first_N1 >= 0) & (follows_NW < limit_N1)
        self._draft[IDS, :num_seqs, :width] = next_NW
        self._draft[IDS, :num_seqs, width:] = num_right_N1
        self._draft[POSITIONS, :num_seqs, :width] = torch.where(is_row, follows_NW, -1)
        self._draft_pass(num_seqs)
        drafts_NK = self._drafts_KN[:, :num_seqs].t()
        self._results[:num_seqs] = torch.cat((next_NW, num_right_N1, drafts_NK), dim=1)
        follows_NW = first_N1 + num_right_N1 + 1 + place_W
        is_row = (first_N1 >= 0) & (follows_NW < limit_N1)
        self._main[IDS, :num_seqs] = torch.cat((next_NW.gather(1, num_right_N1), drafts_NK), dim=1)
        self._main[POSITIONS, :num_seqs] = torch.where(is_row, follows_NW, -1)

    def _row_tables(self, num_seqs: int) -> torch.Tensor:
        return self._tables_NB[:num_seqs].unsqueeze(1).expand(-1, self.width, -1).flatten(0, 1)

    def _batch(
        self, ids_R: torch.Tensor, positions_R: torch.Tensor, tables_RB: torch.Tensor, first_token: int
    ) -> ForwardBatch:
        """Every row is a decode."""
        places_R1 = (positions_R // self._block_size).clamp_(min=0).unsqueeze(1)
        blocks_R = tables_RB.gather(1, places_R1).squeeze(1).to(torch.int64)
        slots_R = blocks_R * self._block_size + positions_R % self._block_size
        slots_R.masked_fill_(positions_R < 0, -1)
        plan = DevicePlan(
            positions_T=positions_R,
            slot_mapping_T=slots_R,
            num_decodes=positions_R.shape[0],
            block_tables_SB=tables_RB,
            context_len_S=(positions_R + 1).to(torch.int32),
            chunks=None,
            first_token=first_token,
        )
        return ForwardBatch(
            token_ids_T=ids_R,
            positions_T=positions_R,
            slot_mapping_T=slots_R,
            num_decodes=positions_R.shape[0],
            query_start=[],
            context_len=[],
            block_tables=[],
            logits_rows_N=ids_R,
            device_plan=plan,
        )

    def rehearse(self) -> None:
        """Each pass of each size, for compile_ahead()."""
        for size in reversed(self._ladder):
            for step in (self._main_pass, self._draft_pass, self._turn_pass):
                step(size)

    def capture(self) -> None:
        """All graphs, on CUDA only. The cache does not change."""
        if not self._is_cuda:
            return
        self._main.fill_(-1)
        self._main[IDS] = 0
        self._draft.fill_(-1)
        self._draft[IDS] = 0
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for size in reversed(self._ladder):  # the largest first: the others fit in its memory
            for graphs, step in (
                (self._main_graphs, self._main_pass),
                (self._draft_graphs, self._draft_pass),
                (self._turn_graphs, self._turn_pass),
            ):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step(size)  # compiles kernels, picks algorithms
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    step(size)
                graphs[size] = graph
        torch.cuda.synchronize()
        self._model.take_expert_load()
