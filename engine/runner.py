"""Executes one step: tensors in, model, logits of the rows that need them, tokens out. Knows no queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from engine.batch_tensors import BatchTensors
from engine.chunk_graphs import ChunkGraphs
from engine.decode_graphs import DecodeGraphs, DecodeLaunch, GraphLimits
from engine.forward_batch import ForwardBatch
from engine.grammar.step_masks import GrammarTimes
from engine.kv_cache import KvCache
from engine.logits_edits import needs_edits
from engine.logprobs import token_logprobs
from engine.mixed_graphs import MixedGraphs
from engine.outputs import TokenLogprobs
from engine.phase_times import PhaseTimes
from engine.sampler import GREEDY_BELOW, Sampler
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM, LayerDone

LOGITS_ROWS_AT_ONCE = 64  # of prompt logprobs: bounds the memory of [rows, vocabulary]
DEVICE_LOAD_STEPS = 256


@dataclass(slots=True)
class StepResult:
    seqs: list[Sequence] = field(default_factory=list)  # that got a token
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
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

    last_rows: list[tuple[Sequence, int]]
    prompt_rows: list[_PromptRows]
    batch: ForwardBatch


class Runner:
    def __init__(
        self,
        model: CausalLM,
        kv_cache: KvCache,
        sampler: Sampler,
        token_budget: int,
        device: str,
        *,
        graph_limits: GraphLimits | None = None,
    ) -> None:
        """With limits, and a model whose attention is kernels, decodes run apart from chunks, as graphs."""
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._tensors = BatchTensors(
            token_budget, kv_cache.layout.block_size, device, uses_kernels=model.uses_kernels
        )
        self._is_on_cpu = torch.device(device).type == "cpu"
        self._num_steps = 0
        self._graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self.start_times = PhaseTimes()  # of the graphs, compiling their kernels included
        if graph_limits is not None and model.uses_kernels:
            with self.start_times.phase("decode graphs"):
                self._graphs = DecodeGraphs(model, kv_cache, graph_limits)
            with self.start_times.phase("chunk graphs"):
                self._chunk_graphs = ChunkGraphs(model, kv_cache, token_budget)
            with self.start_times.phase("mixed graphs"):
                self._mixed_graphs = MixedGraphs(model, kv_cache, self._graphs, self._chunk_graphs)
        self.merges_steps = True  # decodes and chunks in one pass, where a graph fits

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> StepResult:
        """Computes the batch; a sequence whose last token is computed gets the next one, which is not
        appended. Prompt logprobs are appended to their sequences. An empty batch is an idle step."""
        self._num_steps += 1
        self._sampler.begin(_sampled(batch))
        decodes = batch.seqs[: batch.num_decodes]
        if self._graphs is None or not decodes or any(seq.wants_prompt_logprobs for seq in decodes):
            result = self._run_eagerly(batch, layer_done)
        else:
            result = self._run_decodes_apart(self._graphs, decodes, batch, layer_done)
        result.expert_load = self._take_expert_load()
        result.grammar = self._sampler.take_grammar_times()
        return result

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

    def _take_tokens(
        self, graphs: DecodeGraphs, launch: DecodeLaunch, wanted: set[Sequence], result: StepResult
    ) -> None:
        seqs = launch.seqs
        if all(map(_is_plain_greedy, seqs)):
            token_ids: list[int] = launch.token_ids()
            logprobs: list[TokenLogprobs | None] = [None] * len(seqs)
        else:
            token_ids, logprobs = self._sampler.sample(graphs.logits(len(seqs)), seqs)
        for seq, token_id, logprob in zip(seqs, token_ids, logprobs, strict=True):
            if launch.has(seq) and seq in wanted:
                wanted.remove(seq)
                result.seqs.append(seq)
                result.token_ids.append(token_id)
                result.logprobs.append(logprob)

    def _run_eagerly(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> StepResult:
        prepared = self._prepare(batch)
        last_rows, prompt_rows, forward_batch = prepared.last_rows, prepared.prompt_rows, prepared.batch
        if self._chunk_graphs is not None and not prompt_rows and self._chunk_graphs.fits(forward_batch):
            logits_NV = self._chunk_graphs.run(forward_batch, len(last_rows))
            self._announce_layers(layer_done, self._chunk_graphs)
            return self._sampled_rows(logits_NV, last_rows)
        hidden_TD = self._model.forward(forward_batch, self._kv_cache, layer_done)
        result = StepResult()
        for part in prompt_rows:
            self._add_prompt_logprobs(hidden_TD, part)
        if last_rows:
            result.seqs = [seq for seq, _ in last_rows]
            rows_N = forward_batch.logits_rows_N[: len(last_rows)]
            is_all = len(last_rows) == forward_batch.num_tokens
            logits_NV = self._model.logits(hidden_TD if is_all else hidden_TD.index_select(0, rows_N))
            result.token_ids, result.logprobs = self._sampler.sample(logits_NV, result.seqs)
        return result

    def _run_merged(
        self,
        graphs: DecodeGraphs,
        mixed: MixedGraphs,
        decodes: list[Sequence],
        chunks: _Prepared,
        layer_done: LayerDone | None,
    ) -> StepResult:
        launch, logits_NV = mixed.launch(decodes, chunks.batch, len(chunks.last_rows))
        self._announce_layers(layer_done)
        result = self._sampled_rows(logits_NV, chunks.last_rows)
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
        last_rows, prompt_rows = _wanted_rows(batch)
        rows = [row for _, row in last_rows]
        for part in prompt_rows:
            rows.extend(range(part.begin, part.end))
        return _Prepared(last_rows, prompt_rows, self._tensors.build(batch, rows))

    def _sampled_rows(self, logits_NV: torch.Tensor, last_rows: list[tuple[Sequence, int]]) -> StepResult:
        """logits of the last rows, in order."""
        result = StepResult(seqs=[seq for seq, _ in last_rows])
        if last_rows:
            result.token_ids, result.logprobs = self._sampler.sample(logits_NV.float(), result.seqs)
        return result

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
    return [seq for seq, num_tokens in pairs if seq.num_remaining_tokens == num_tokens]


def _is_plain_greedy(seq: Sequence) -> bool:
    sampling = seq.sampling
    return sampling.temperature < GREEDY_BELOW and sampling.num_logprobs is None and not needs_edits(seq)


def _may_run_ahead(seqs: list[Sequence], *, somebody_may_end: bool) -> bool:
    """Greedy tokens are final as the device finds them; and somebody must go on. Where one ends the next
    prompt often follows at once, and then its chunks should share the step with the decodes."""
    go_on = [seq.num_output_tokens + 1 < seq.max_output_tokens for seq in seqs]
    return (any(go_on) if somebody_may_end else all(go_on)) and all(
        seq.num_remaining_tokens == 1 and _is_plain_greedy(seq) for seq in seqs
    )


def _wanted_rows(batch: ScheduledBatch) -> tuple[list[tuple[Sequence, int]], list[_PromptRows]]:
    last_rows, prompt_rows = [], []
    begin = 0
    for seq, num_tokens in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
        first = seq.num_computed_tokens
        if first + num_tokens == seq.num_tokens:
            last_rows.append((seq, begin + num_tokens - 1))
        if seq.wants_prompt_logprobs:
            num_rows = min(first + num_tokens, seq.num_prompt_tokens - 1) - first
            if num_rows > 0:
                next_ids = seq.token_ids[first + 1 : first + 1 + num_rows].tolist()
                prompt_rows.append(_PromptRows(seq, begin, begin + num_rows, next_ids))
        begin += num_tokens
    return last_rows, prompt_rows
