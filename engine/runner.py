"""Executes one step: tensors in, model, logits of the rows that need them, tokens out. Knows no queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from engine.batch_rows import SequenceRows, main_rows
from engine.batch_tensors import BatchTensors
from engine.chunk_graphs import ChunkGraphs
from engine.decode_graphs import DecodeGraphs, DecodeLaunch, GraphLimits
from engine.forward_batch import ForwardBatch
from engine.grammar.step_masks import GrammarTimes
from engine.kv_cache import KvCache
from engine.logprobs import token_logprobs
from engine.mixed_graphs import MixedGraphs
from engine.outputs import TokenLogprobs
from engine.phase_times import PhaseTimes
from engine.sampler import Sampler, is_plain_greedy
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.draft_plan import DraftLimits
from engine.speculation.draft_state import DraftState
from engine.speculation.drafter import Drafter
from engine.speculation.graphed_decodes import GraphedDecodes
from engine.speculation.handed_draft import HandedDraft
from engine.speculation.verification import NewTokens, logits_rows, single_tokens, verify

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM, LayerDone

LOGITS_ROWS_AT_ONCE = 64  # of prompt logprobs: bounds the memory of [rows, vocabulary]
DEVICE_LOAD_STEPS = 256


@dataclass(slots=True)
class StepResult:
    new: list[NewTokens] = field(default_factory=list)
    expert_load: tuple[tuple[int, ...], ...] = ()
    grammar: GrammarTimes = field(default_factory=GrammarTimes)


@dataclass(slots=True)
class _PromptRows:
    """Rows of one chunk whose next token is a prompt token, for prompt logprobs."""

    seq: Sequence
    begin: int
    end: int
    next_token_ids: list[int]


@dataclass(slots=True)
class _Prepared:
    """A batch as tensors, which hold until the next one is prepared."""

    rows: list[SequenceRows]
    sampled: list[SequenceRows]
    wanted_rows: list[int]  # whose logits are needed
    prompt_rows: list[_PromptRows]
    batch: ForwardBatch


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
        """With graph_limits, and a model whose attention is kernels, decodes run apart from chunks, as
        graphs. With draft_limits, and a model that can, tokens are drafted."""
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
        self._graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self._graphed_drafts: GraphedDecodes | None = None
        self.start_times = PhaseTimes()  # of the graphs, compiling their kernels included
        self.merges_steps = True  # decodes and chunks in one pass, where a graph fits
        if graph_limits is not None and model.uses_kernels:
            self._capture_graphs(graph_limits, token_budget, draft_limits)

    def _capture_graphs(
        self, limits: GraphLimits, token_budget: int, draft_limits: DraftLimits | None
    ) -> None:
        if self._drafter is not None and draft_limits is not None:
            if not limits.max_seqs:
                return
            with self.start_times.phase("draft graphs"):
                draft_graphs = DraftGraphs(self._model, self._kv_cache, limits, draft_limits.num_tokens)
            self._graphed_drafts = GraphedDecodes(
                draft_graphs, self._drafter.planner, self._sampler, limits.max_seqs
            )
            return
        with self.start_times.phase("chunk graphs"):
            self._chunk_graphs = ChunkGraphs(self._model, self._kv_cache, token_budget)
        if not limits.max_seqs:
            return
        with self.start_times.phase("decode graphs"):
            self._graphs = DecodeGraphs(self._model, self._kv_cache, limits)
        with self.start_times.phase("mixed graphs"):
            self._mixed_graphs = MixedGraphs(self._model, self._kv_cache, self._graphs, self._chunk_graphs)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> StepResult:
        """Computes the batch; a sequence whose last token is computed gets the next one, or more of them with
        drafts; they are not appended. Prompt logprobs are appended to their sequences. An empty batch is an
        idle step."""
        self._num_steps += 1
        if self._graphed_drafts is not None:
            self._graphed_drafts.collect()
        decodes = batch.seqs[: batch.num_decodes]
        if self._graphed_drafts is not None:
            result = self._run_drafts_apart(self._graphed_drafts, batch, layer_done)
        elif self._graphs is None or not decodes or any(seq.wants_prompt_logprobs for seq in decodes):
            self._sampler.begin(_sampled(batch))
            result = self._run_eagerly(batch, layer_done)
        else:
            result = self._run_decodes_apart(self._graphs, decodes, batch, layer_done)
        result.expert_load = self._take_expert_load()
        result.grammar = self._sampler.take_grammar_times()
        return result

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

    def _run_decodes_apart(
        self,
        graphs: DecodeGraphs,
        decodes: list[Sequence],
        batch: ScheduledBatch,
        layer_done: LayerDone | None,
    ) -> StepResult:
        """Chunks go through the layers together with the decodes, unless these were run ahead; else they are
        launched behind them, before anybody waits. Without chunks the next step is, too: it holds unless a
        sequence joins, and one that ends costs a row."""
        self._sampler.begin(_sampled(batch))
        chunks = ScheduledBatch(
            seqs=batch.seqs[batch.num_decodes :],
            num_scheduled_tokens=batch.num_scheduled_tokens[batch.num_decodes :],
        )
        ahead = graphs.take_ahead(decodes)
        if ahead is None and self._mixed_graphs is not None and self._can_merge(self._mixed_graphs, chunks):
            return self._run_merged(graphs, self._mixed_graphs, decodes, self._prepare(chunks), layer_done)
        launches = [] if ahead is None else [ahead]
        others = decodes if ahead is None else [seq for seq in decodes if not ahead.has(seq)]
        if others:
            launches.append(graphs.launch(others))
        result = StepResult()
        if chunks.seqs:
            result = self._run_eagerly(chunks, layer_done)
        else:
            self._announce_layers(layer_done)
            is_whole = len(launches) == 1 and len(launches[0].seqs) == len(decodes)
            if is_whole and _may_run_ahead(decodes, somebody_may_end=not self.merges_steps):
                graphs.run_ahead(launches[0])
        wanted = {seq for seq in decodes if seq.num_remaining_tokens == 1}  # else: a row of a longer prompt
        for launch in launches:
            self._take_tokens(graphs, launch, wanted, result)
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
            self._sampler.begin(_sampled(batch))
            return self._run_eagerly(batch, layer_done)
        if not others.seqs and all(map(is_plain_greedy, drafting.seqs)):
            self._announce_layers(layer_done)
            return StepResult(graphed.run_greedily(main_rows(drafting, speculates=True)))
        graphed.start(main_rows(drafting, speculates=True))
        self._sampler.begin(drafting.seqs)
        result = StepResult(graphed.verify())
        if others.seqs:
            self._sampler.begin(_sampled(others))
            result.new += self._run_eagerly(others, layer_done).new
        else:
            self._announce_layers(layer_done)
        graphed.finish()
        return result

    def _take_tokens(
        self, graphs: DecodeGraphs, launch: DecodeLaunch, wanted: set[Sequence], result: StepResult
    ) -> None:
        seqs = launch.seqs
        if all(map(is_plain_greedy, seqs)):
            token_ids: list[int] = launch.token_ids()
            logprobs: list[TokenLogprobs | None] = [None] * len(seqs)
        else:
            token_ids, logprobs = self._sampler.sample(graphs.logits(len(seqs)), seqs)
        for tokens in single_tokens(seqs, token_ids, logprobs):
            if launch.has(tokens.seq) and tokens.seq in wanted:
                wanted.remove(tokens.seq)
                result.new.append(tokens)

    def _run_eagerly(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> StepResult:
        prepared = self._prepare(batch)
        sampled, forward_batch = prepared.sampled, prepared.batch
        if (
            self._chunk_graphs is not None
            and not prepared.prompt_rows
            and self._chunk_graphs.fits(forward_batch)
        ):
            logits_NV = self._chunk_graphs.run(forward_batch, len(sampled))
            self._announce_layers(layer_done, self._chunk_graphs)
            return StepResult(verify(self._sampler, logits_NV.float(), sampled))
        hidden_TD = self._model.forward(forward_batch, self._kv_cache, layer_done)
        for part in prepared.prompt_rows:
            self._add_prompt_logprobs(hidden_TD, part)
        result = StepResult()
        if sampled:
            is_all = prepared.wanted_rows == list(range(forward_batch.num_tokens))
            rows_ND = hidden_TD if is_all else hidden_TD.index_select(0, forward_batch.logits_rows_N)
            result.new = verify(self._sampler, self._model.logits(rows_ND), sampled)
        if self._drafter is not None:
            self._drafter.draft(prepared.rows, batch.num_decodes, hidden_TD, result.new)
            if layer_done is not None:
                layer_done(self._kv_cache.layout.num_layers - 1)
        return result

    def _run_merged(
        self,
        graphs: DecodeGraphs,
        mixed: MixedGraphs,
        decodes: list[Sequence],
        chunks: _Prepared,
        layer_done: LayerDone | None,
    ) -> StepResult:
        launch, logits_NV = mixed.launch(decodes, chunks.batch, len(chunks.sampled))
        self._announce_layers(layer_done)
        result = StepResult()
        if chunks.sampled:
            result.new = verify(self._sampler, logits_NV.float(), chunks.sampled)
        wanted = {seq for seq in decodes if seq.num_remaining_tokens == 1}
        self._take_tokens(graphs, launch, wanted, result)
        return result

    def _can_merge(self, mixed: MixedGraphs, chunks: ScheduledBatch) -> bool:
        return (
            self.merges_steps
            and mixed.takes(len(chunks.seqs), chunks.num_tokens)
            and not any(seq.num_computed_tokens or seq.wants_prompt_logprobs for seq in chunks.seqs)
        )

    def _prepare(self, batch: ScheduledBatch) -> _Prepared:
        rows = main_rows(batch, speculates=self._drafter is not None)
        sampled = [part for part in rows if part.end_position >= part.seq.num_tokens]
        wanted_rows = logits_rows(sampled)
        forward_batch = self._tensors.build(rows, batch.num_decodes, wanted_rows)
        return _Prepared(rows, sampled, wanted_rows, _prompt_rows(rows), forward_batch)

    def _announce_layers(self, layer_done: LayerDone | None, graphs: ChunkGraphs | None = None) -> None:
        """All at once, behind what was launched: a graph cannot call back. The events in it tell how far it
        has got."""
        if layer_done is not None:
            for layer in range(self._kv_cache.layout.num_layers):
                layer_done(layer, None if graphs is None else graphs.computed(layer))

    def _add_prompt_logprobs(self, hidden_TD: torch.Tensor, part: _PromptRows) -> None:
        num_top = part.seq.sampling.num_prompt_logprobs or 0
        for begin in range(part.begin, part.end, LOGITS_ROWS_AT_ONCE):
            end = min(begin + LOGITS_ROWS_AT_ONCE, part.end)
            logits = self._model.logits(hidden_TD[begin:end])
            token_ids = part.next_token_ids[begin - part.begin : end - part.begin]
            part.seq.prompt_logprobs += token_logprobs(logits, token_ids, [num_top] * len(token_ids))

    def _take_expert_load(self) -> tuple[tuple[int, ...], ...]:
        """Off the CPU in some steps only, of all steps since: reading waits for the device."""
        if not self._is_on_cpu and self._num_steps % DEVICE_LOAD_STEPS:
            return ()
        load_LE = self._model.take_expert_load()
        return () if load_LE is None else tuple(tuple(layer) for layer in load_LE.tolist())


def _sampled(batch: ScheduledBatch) -> list[Sequence]:
    """Those whose last token is computed in this step."""
    pairs = zip(batch.seqs, batch.num_scheduled_tokens, strict=True)
    return [seq for seq, num_tokens in pairs if seq.num_remaining_tokens <= num_tokens]


def _may_run_ahead(seqs: list[Sequence], *, somebody_may_end: bool) -> bool:
    """Greedy tokens are final as the device finds them; and somebody must go on. Where one ends the next
    prompt often follows at once, and then its chunks should share the step with the decodes."""
    go_on = [seq.num_output_tokens + 1 < seq.max_output_tokens for seq in seqs]
    return (any(go_on) if somebody_may_end else all(go_on)) and all(
        seq.num_remaining_tokens == 1 and is_plain_greedy(seq) for seq in seqs
    )


def _prompt_rows(rows: list[SequenceRows]) -> list[_PromptRows]:
    wanted = []
    for part in rows:
        seq = part.seq
        first, end = seq.num_computed_tokens, min(part.end_position, seq.num_prompt_tokens - 1)
        if seq.wants_prompt_logprobs and first < end:
            next_ids = seq.token_ids[first + 1 : end + 1].tolist()
            wanted.append(_PromptRows(seq, part.row_of(first), part.row_of(end), next_ids))
    return wanted
