"""Steps on a device, launched without waiting for any of them: while one runs, the host reads the tokens of
the one before and plans the one behind.

Each step leaves the tokens that it finds on the device, at known places, and the next one takes them from
there. Only what needs the host keeps it waiting: tokens of sequences with a grammar, penalties or logprobs
are drawn here, and the step behind them is launched when they are known.

Decodes and chunks go through the layers together where a graph fits both (MixedGraphs), else one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch_tensors import BatchTensors
from engine.chunk_graphs import MAX_CHUNKS, ChunkGraphs
from engine.decode_graphs import DecodeGraphs, GraphLimits
from engine.device_draws import DeviceDraws
from engine.kernels.compile_ahead import compile_ahead
from engine.launch import LOAD_STEPS, StepResult
from engine.mixed_graphs import MixedGraphs
from engine.phase_times import PhaseTimes
from engine.prepared_batch import PreparedBatch, prepare
from engine.sampler import GREEDY_BELOW, Sampler, is_plain
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from engine.speculation.verification import single_tokens
from engine.uploads import upload

if TYPE_CHECKING:
    from engine.kv_cache import KvCache
    from engine.models.causal_lm import CausalLM, LayerDone


@dataclass(slots=True)
class DeviceLaunch:
    """Places of tokens drawn on the device; and logits, float32 [N, V], of those that the host will draw."""

    sampler: Sampler
    has_decodes: bool  # a row can take a token that was left on the device
    places: dict[Sequence, int] = field(default_factory=dict)
    by_host: list[tuple[torch.Tensor, list[Sequence]]] = field(default_factory=list)
    found_P: torch.Tensor | None = None  # on the host, once the step is done
    load_LE: torch.Tensor | None = None  # likewise
    began: torch.cuda.Event | None = None  # the device reaches it when it is done with the step before
    done: torch.cuda.Event | None = None

    @property
    def is_open(self) -> bool:
        return not self.by_host and (self.has_decodes or all(seq.keeps_blocks for seq in self.places))

    @property
    def is_done(self) -> bool:
        return self.done is None or self.done.query()

    @property
    def device_s(self) -> float | None:
        if self.began is None or self.done is None:
            return None
        return self.began.elapsed_time(self.done) / 1e3

    @torch.inference_mode()
    def collect(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        result = StepResult()
        if self.places:
            assert self.found_P is not None
            found: list[int] = self.found_P.tolist()
            token_ids = [found[place] for place in self.places.values()]
            result.new = single_tokens(list(self.places), token_ids, [None] * len(token_ids))
        for logits_NV, seqs in self.by_host:
            result.new += single_tokens(seqs, *self.sampler.sample(logits_NV, seqs))
        if self.load_LE is not None:
            result.expert_load = tuple(tuple(layer) for layer in self.load_LE.tolist())
        result.grammar = self.sampler.take_grammar_times()
        return result


class DeviceSteps:
    def __init__(
        self,
        model: CausalLM,
        kv_cache: KvCache,
        sampler: Sampler,
        tensors: BatchTensors,
        limits: GraphLimits,
        token_budget: int,
    ) -> None:
        """Captures graphs: seconds to minutes. The model's attention is kernels."""
        from engine.kernels.sampling import greedy_tokens  # Triton is not everywhere

        self._pick = greedy_tokens
        self.start_times = PhaseTimes()
        self._device = device = kv_cache.data.device
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._tensors = tensors
        self._max_decodes = limits.max_seqs
        num_chunk_places = max(token_budget, MAX_CHUNKS)
        # Rows of decodes, then chunks in the order of the batch.
        num_places = self._max_decodes + num_chunk_places
        self._found_P = torch.zeros(num_places, dtype=torch.int64, device=device)
        is_cuda = device.type == "cuda"
        # Of two launches that can be under way, and the one that is being read.
        self._host_found_3P = torch.zeros(3, num_places, dtype=torch.int64, pin_memory=is_cuda)
        self._decode_draws = DeviceDraws(self._max_decodes, device)
        self._chunk_draws = DeviceDraws(num_chunk_places, device)
        self._last: DeviceLaunch | None = None
        self._num_launches = 0
        self._has_chunk_graphs = True
        self._chunks = ChunkGraphs(model, kv_cache, token_budget, self._found_P[self._max_decodes :])
        self._decodes: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        graphs: dict[str, ChunkGraphs | DecodeGraphs | MixedGraphs] = {"chunk graphs": self._chunks}
        if self._max_decodes:
            self._decodes = DecodeGraphs(model, kv_cache, limits, self._found_P)
            self._mixed = MixedGraphs(model, kv_cache, self._decodes, self._chunks)
            graphs |= {"decode graphs": self._decodes, "mixed graphs": self._mixed}
        with self.start_times.phase("kernels"), model.one_layer_of_each_kind():
            compile_ahead(lambda: [each.rehearse() for each in graphs.values()])
        for phase, each in graphs.items():
            with self.start_times.phase(phase):
                each.capture()

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> DeviceLaunch:
        """The launch before may be under way if it is open; it is collected before the next one. Prompt
        logprobs are waited for, and appended to their sequences."""
        launch = DeviceLaunch(self._sampler, has_decodes=self._decodes is not None)
        if self._device.type == "cuda":
            launch.began = torch.cuda.Event(enable_timing=True)
            launch.began.record()
        decodes, chunks = ScheduledBatch(), batch
        if self._decodes is not None:
            decodes, chunks = batch.split(lambda seq: not seq.wants_prompt_logprobs)
        self._sampler.begin(seq for seq in batch.sampled if not is_plain(seq))
        prepared = prepare(chunks, self._tensors, speculates=False) if chunks.seqs else None
        if prepared is None or (decodes.seqs and self._merge(decodes.seqs, prepared, launch)):
            if prepared is None:
                self._run_decodes(decodes.seqs, launch)
            self._announce(layer_done, None)
        else:
            self._run_decodes(decodes.seqs, launch)
            self._run_chunks(prepared, layer_done, launch)
        self._copy_out(launch)
        self._last = launch
        return launch

    @contextmanager
    def without_chunk_graphs(self) -> Iterator[None]:
        """Inside, chunks are launched kernel by kernel, as those are that no graph fits."""
        self._has_chunk_graphs = False
        try:
            yield
        finally:
            self._has_chunk_graphs = True

    def _merge(self, seqs: list[Sequence], prepared: PreparedBatch, launch: DeviceLaunch) -> bool:
        """Whether they went through the layers together."""
        mixed = self._mixed
        if mixed is None or prepared.prompt_rows or not mixed.fits(prepared.batch):
            return False
        placed = mixed.launch(seqs, self._pending_places(seqs), prepared.batch, len(prepared.sampled))
        self._take_decodes(placed, launch)
        self._take_chunks(prepared, self._chunks.logits(len(prepared.sampled)), launch)
        return True

    def _run_decodes(self, seqs: list[Sequence], launch: DeviceLaunch) -> None:
        if seqs:
            assert self._decodes is not None
            self._take_decodes(self._decodes.launch(seqs, self._pending_places(seqs)), launch)

    def _run_chunks(
        self, prepared: PreparedBatch, layer_done: LayerDone | None, launch: DeviceLaunch
    ) -> None:
        num_sampled = len(prepared.sampled)
        has_graph = self._has_chunk_graphs and not prepared.prompt_rows
        if has_graph and self._chunks.fits(prepared.batch):
            logits_NV = self._chunks.run(prepared.batch, num_sampled)
            self._announce(layer_done, self._chunks.computed)
            self._take_chunks(prepared, logits_NV, launch)
            return
        hidden_ND = self._model.forward(
            prepared.batch, self._kv_cache, layer_done, wanted_N=prepared.wanted_N
        )
        for part in prepared.prompt_rows:
            part.add_logprobs(self._model, hidden_ND)
        if num_sampled:
            logits_NV = self._model.logits(prepared.wanted(hidden_ND))
            self._pick(logits_NV, self._found_P[self._max_decodes :][:num_sampled])
            self._take_chunks(prepared, logits_NV, launch)

    def _pending_places(self, seqs: list[Sequence]) -> dict[Sequence, int]:
        last = self._last
        return {} if last is None else {seq: last.places[seq] for seq in seqs if seq.num_pending_tokens}

    def _take_decodes(self, placed: list[Sequence], launch: DeviceLaunch) -> None:
        """A row of a longer prompt gives no token."""
        assert self._decodes is not None
        rows = [(row, seq) for row, seq in enumerate(placed) if seq.num_remaining_tokens == 1]
        if any(_is_random(seq) for _, seq in rows):
            positions_N = self._decodes.positions() + 1
            self._decode_draws.draw(self._decodes.logits_NV, placed, positions_N, self._found_P)
        self._take(rows, 0, self._decodes.logits_NV, launch)

    def _take_chunks(self, prepared: PreparedBatch, logits_NV: torch.Tensor, launch: DeviceLaunch) -> None:
        seqs = [part.seq for part in prepared.sampled]
        if any(map(_is_random, seqs)):
            positions_N = upload(np.array([seq.num_tokens for seq in seqs]), self._device)
            self._chunk_draws.draw(logits_NV, seqs, positions_N, self._found_P[self._max_decodes :])
        self._take(list(enumerate(seqs)), self._max_decodes, logits_NV, launch)

    def _take(
        self,
        rows: list[tuple[int, Sequence]],
        first_place: int,
        logits_NV: torch.Tensor,
        launch: DeviceLaunch,
    ) -> None:
        """rows: of the logits, with the sequence whose token follows."""
        by_host = [(row, seq) for row, seq in rows if not is_plain(seq)]
        launch.places.update((seq, first_place + row) for row, seq in rows if is_plain(seq))
        if by_host:
            index_N = upload(np.array([row for row, _ in by_host]), self._device)
            launch.by_host.append((logits_NV[index_N].float(), [seq for _, seq in by_host]))

    def _copy_out(self, launch: DeviceLaunch) -> None:
        self._num_launches += 1
        is_cuda = self._device.type == "cuda"
        if launch.places:
            num_places = 1 + max(launch.places.values())
            launch.found_P = self._host_found_3P[self._num_launches % 3, :num_places]
            launch.found_P.copy_(self._found_P[:num_places], non_blocking=True)
        if not is_cuda or self._num_launches % LOAD_STEPS == 0:
            load_LE = self._model.take_expert_load()
            if load_LE is not None:
                host_LE = torch.empty(load_LE.shape, dtype=load_LE.dtype, pin_memory=is_cuda)
                launch.load_LE = host_LE.copy_(load_LE, non_blocking=True)
        if is_cuda:
            launch.done = torch.cuda.Event(enable_timing=True)
            launch.done.record()

    def _announce(
        self,
        layer_done: LayerDone | None,
        computed: Callable[[int], torch.cuda.Event | None] | None,
    ) -> None:
        """All layers at once, behind what was launched: a graph cannot call back. The events in it tell how
        far it has got."""
        if layer_done is not None:
            for layer in range(self._kv_cache.layout.num_layers):
                layer_done(layer, None if computed is None else computed(layer))


def _is_random(seq: Sequence) -> bool:
    return seq.sampling.temperature >= GREEDY_BELOW
