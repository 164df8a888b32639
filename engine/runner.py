"""Executes one step: tensors in, model, logits of the rows that need them, tokens out. Knows no queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engine.batch_rows import main_rows
from engine.batch_tensors import BatchTensors
from engine.decode_graphs import GraphLimits
from engine.device_steps import DeviceSteps
from engine.kernels.compile_ahead import compile_ahead
from engine.kv_cache import KvCache
from engine.launch import LOAD_STEPS, FinishedLaunch, Launch, StepResult
from engine.phase_times import PhaseTimes
from engine.prepared_batch import prepare
from engine.sampler import Sampler, is_plain_greedy
from engine.scheduler import ScheduledBatch
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.draft_plan import DraftLimits
from engine.speculation.draft_state import DraftState
from engine.speculation.drafter import Drafter
from engine.speculation.graphed_decodes import GraphedDecodes
from engine.speculation.handed_draft import HandedDraft
from engine.speculation.verification import verify

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM, LayerDone


class Runner:
    def __init__(  # noqa: PLR0913 - two of them are rare and keyword-only
        self,
        model: CausalLM,
        kv_cache: KvCache,
        sampler: Sampler,
        token_budget: int,
        device: str,
        *,
        graph_limits: GraphLimits | None = None,
        draft_limits: DraftLimits | None = None,
    ) -> None:
        """With graph_limits, and a model whose attention is kernels, steps are graphs, launched ahead of each
        other. With draft_limits, and a model that can, tokens are drafted."""
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        max_rows = 2 * token_budget  # a sequence may have a row beside the budget, for its hidden state
        self._tensors = BatchTensors(
            max_rows, kv_cache.layout.block_size, device, uses_kernels=model.uses_kernels
        )
        self._drafter: Drafter | None = None
        if draft_limits is not None:
            self._drafter = Drafter(model, kv_cache, sampler, draft_limits, max_rows, device)
        self._is_on_cpu = torch.device(device).type == "cpu"
        self._num_steps = 0
        self.device_steps: DeviceSteps | None = None
        self._graphed_drafts: GraphedDecodes | None = None
        self.start_times = PhaseTimes()  # of the graphs and their kernels
        if graph_limits is None or not model.uses_kernels:
            return
        if self._drafter is None:
            self.device_steps = DeviceSteps(
                model, kv_cache, sampler, self._tensors, graph_limits, token_budget
            )
            self.start_times = self.device_steps.start_times
        elif draft_limits is not None and graph_limits.max_seqs:
            draft_graphs = DraftGraphs(model, kv_cache, graph_limits, draft_limits.num_tokens)
            with self.start_times.phase("kernels"), model.one_layer_of_each_kind():
                compile_ahead(draft_graphs.rehearse)
            with self.start_times.phase("draft graphs"):
                draft_graphs.capture()
            self._graphed_drafts = GraphedDecodes(
                draft_graphs, self._drafter.planner, sampler, graph_limits.max_seqs
            )

    def launch(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> Launch:
        """Computes the batch, or starts to: a sequence whose last token is computed gets the next one, or
        more of them with drafts; they are not appended. Prompt logprobs are appended to their sequences. An
        empty batch is an idle step."""
        if self.device_steps is not None and batch.seqs:
            return self.device_steps.launch(batch, layer_done)
        return FinishedLaunch(self._run(batch, layer_done))

    def forget_expert_load(self) -> None:
        """What was computed so far does not count."""
        self._model.take_expert_load()

    def join_group(self, recount: Callable[[int], None]) -> None:
        """recount(rows) before each pass that agree() knows nothing of, in every step and on every rank."""
        if self._drafter is not None:
            self._drafter.recount = recount

    def num_rows(self, batch: ScheduledBatch) -> int:
        """Of the main model's pass."""
        return sum(part.num_rows for part in main_rows(batch, speculates=self._drafter is not None))

    def unpack_draft(self, handed: HandedDraft, num_tokens: int) -> DraftState:
        """Of a sequence of num_tokens that comes from another engine. ValueError when it does not fit."""
        return DraftState() if self._drafter is None else self._drafter.unpack(handed, num_tokens)

    @torch.inference_mode()
    def _run(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> StepResult:
        self._num_steps += 1
        if self._graphed_drafts is None:
            self._sampler.begin(batch.sampled)
            result = self._run_eagerly(batch, layer_done)
        else:
            self._graphed_drafts.collect()
            result = self._run_drafts_apart(self._graphed_drafts, batch, layer_done)
        result.expert_load = self._take_expert_load()
        result.grammar = self._sampler.take_grammar_times()
        return result

    def _run_drafts_apart(
        self,
        graphed: GraphedDecodes,
        batch: ScheduledBatch,
        layer_done: LayerDone | None,
    ) -> StepResult:
        """The other sequences are launched behind the draft layer's pass, before anybody waits for drafts."""
        drafting, others = batch.split(graphed.can_run)
        if not drafting.seqs:
            self._sampler.begin(batch.sampled)
            return self._run_eagerly(batch, layer_done)
        if not others.seqs and all(map(is_plain_greedy, drafting.seqs)):
            self._announce_layers(layer_done)
            return StepResult(graphed.run_greedily(main_rows(drafting, speculates=True)))
        graphed.start(main_rows(drafting, speculates=True))
        self._sampler.begin(drafting.seqs)
        result = StepResult(graphed.verify())
        if others.seqs:
            self._sampler.begin(others.sampled)
            result.new += self._run_eagerly(others, layer_done).new
        else:
            self._announce_layers(layer_done)
        graphed.finish()
        return result

    def _run_eagerly(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> StepResult:
        prepared = prepare(batch, self._tensors, speculates=self._drafter is not None)
        hidden_ND = self._model.forward(
            prepared.batch, self._kv_cache, layer_done, wanted_N=prepared.wanted_N
        )
        for part in prepared.prompt_rows:
            part.add_logprobs(self._model, hidden_ND)
        result = StepResult()
        if prepared.sampled:
            logits_NV = self._model.logits(prepared.wanted(hidden_ND))
            result.new = verify(self._sampler, logits_NV, prepared.sampled)
        if self._drafter is not None:
            self._drafter.draft(prepared.rows, batch.num_decodes, hidden_ND, result.new)
            if layer_done is not None:
                layer_done(self._kv_cache.layout.num_layers - 1)
        return result

    def _announce_layers(self, layer_done: LayerDone | None) -> None:
        """All at once, behind what was launched: a graph cannot call back."""
        if layer_done is not None:
            for layer in range(self._kv_cache.layout.num_layers):
                layer_done(layer)

    def _take_expert_load(self) -> tuple[tuple[int, ...], ...]:
        """Off the CPU in some steps only, of all steps since: reading waits for the device."""
        if not self._is_on_cpu and self._num_steps % LOAD_STEPS:
            return ()
        load_LE = self._model.take_expert_load()
        return () if load_LE is None else tuple(tuple(layer) for layer in load_LE.tolist())
