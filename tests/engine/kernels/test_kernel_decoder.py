"""A whole model by kernels gives the tokens that the plain form of it gives."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need the package triton (pip install triton)")

from engine import chunk_graphs, mixed_graphs, warm_up
from engine.attention import mla, plan
from engine.attention.device_plan import plan_on_device
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.weights import open_weights
from engine.chunk_graphs import ChunkGraphs
from engine.decode_graphs import GraphLimits, batch_ladder
from engine.engine import Engine, EngineLimits
from engine.forward_batch import ForwardBatch
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammar import Grammar, GrammarKind
from engine.kernels import attention_context, attention_decode
from engine.kernels.mla_fp8_rows import dequantise_mla_rows, row_bytes
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.mixed_graphs import MixedGraphs
from engine.models import build_model
from engine.moe.fused_experts import FusedMoeLayer
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence
from tests.engine.core.engine_driver import hand_off, run
from tests.engine.kernels.fp8_rows import quantised_as_here
from tests.engine.kernels.kernel_batches import scattered_batch
from tests.fakes.tiny_tokenizer import build_tokenizer

BLOCK_SIZE, MAX_RUNNING, MAX_MODEL_LEN = 4, 3, 64
RANK, ROPE = 32, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as kernels allow: the interpreter is slow."""
    path = tmp_path_factory.mktemp("model")
    config = hub_config("deepseek_v2", "tiny", "float32")
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 48, "vocab_size": 512}
    config |= {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config |= {"kv_lora_rank": RANK, "qk_nope_head_dim": 16, "v_head_dim": 16}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than it takes to have several: the interpreter runs them one after another."""
    few_shares = attention_decode.DecodeTuning(max_shares=2)
    monkeypatch.setattr(attention_decode, "_MAX_SHARES", 2)
    monkeypatch.setattr(attention_decode, "_ONE_TUNING", few_shares)
    monkeypatch.setattr(attention_decode, "_FEW_TUNING", few_shares)
    few_expanding = replace(attention_context.FP32_TUNING, num_programs=2)
    monkeypatch.setattr(attention_context, "FP32_TUNING", few_expanding)


def build(
    checkpoint: Path,
    device: str,
    *,
    uses_kernels: bool,
    uses_graphs: bool,
    decodes: bool = True,
    token_budget: int = 24,
    kv_dtype: str = "float32",
) -> Engine:
    config = load_model_config(checkpoint)
    with open_weights(checkpoint, "dummy", torch.float32, config) as weights:
        model = build_model(config, weights, None, torch.float32, device, uses_kernels=uses_kernels)
    layout = KvLayout(
        model_fingerprint="test",
        num_layers=config.num_layers,
        token_shape=(row_bytes(RANK, ROPE),) if kv_dtype == "fp8" else config.kv_token_shape,
        dtype=kv_dtype,
        block_size=BLOCK_SIZE,
    )
    cache = KvCache(layout, 64, device=device)
    limits = EngineLimits(
        max_model_len=MAX_MODEL_LEN, vocab_size=config.vocab_size, eos_token_ids=frozenset()
    )
    graph_limits = GraphLimits(MAX_RUNNING if decodes else 0, MAX_MODEL_LEN) if uses_graphs else None
    runner = Runner(model, cache, Sampler(frozenset()), token_budget, device, graph_limits=graph_limits)
    return Engine(
        runner,
        cache,
        limits,
        SchedulerConfig(token_budget=token_budget, max_running=MAX_RUNNING),
    )


def answers(
    engine: Engine, prompts: list[list[int]], *, temperature: float, longer_by: int = 1
) -> dict[int, list[int]]:
    """Answers of different lengths, each longer than the one before; more than places: rows are left and
    taken over."""
    for seq_id, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=temperature, seed=seq_id, max_tokens=3 + longer_by * seq_id, ignore_eos=True
        )
        engine.add(Sequence(seq_id, prompt, sampling))
    found: dict[int, list[int]] = {seq_id: [] for seq_id in range(len(prompts))}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.seq_id] += output.token_ids
        engine.check_integrity()
    return found


@pytest.mark.parametrize(("uses_graphs", "temperature"), [(False, 0.0), (True, 0.0), (True, 1.0)])
def test_kernels_give_the_tokens_of_the_plain_model(
    checkpoint: Path, device: str, uses_graphs: bool, temperature: float
) -> None:
    rng = random.Random(0)
    shared = [rng.randrange(512) for _ in range(9)]  # two blocks of prefix that later prompts hit
    prompts = [shared + [rng.randrange(512) for _ in range(n)] for n in (5, 9, 3, 12)]
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False)
    by_kernels = build(checkpoint, device, uses_kernels=True, uses_graphs=uses_graphs)

    expected = answers(plain, prompts, temperature=temperature)

    assert answers(by_kernels, prompts, temperature=temperature) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_that_share_a_pass_with_decodes_change_no_token(
    checkpoint: Path, device: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_graphs, "LADDER", (8, 12))
    monkeypatch.setattr(mixed_graphs, "CHUNK_LADDER", (8, 12))  # a chunk of 13 or more goes apart
    monkeypatch.setattr(mixed_graphs, "DECODE_LADDER", (2,))
    steps: list[tuple[int, int]] = []
    launch = MixedGraphs.launch

    def counted(
        self: MixedGraphs, seqs: list[Sequence], places: Any, batch: ForwardBatch, num_wanted: int
    ) -> Any:
        steps.append((len(seqs), batch.num_tokens))
        return launch(self, seqs, places, batch, num_wanted)

    monkeypatch.setattr(MixedGraphs, "launch", counted)
    rng = random.Random(3)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 9, 3, 10, 14)]
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False)
    merged = build(checkpoint, device, uses_kernels=True, uses_graphs=True)

    expected = answers(plain, prompts, temperature=temperature, longer_by=2)

    assert answers(merged, prompts, temperature=temperature, longer_by=2) == expected
    assert steps == [(2, 10)]  # of the two prompts that met decodes the other one is too long


def test_chunks_behind_cached_rows_go_through_graphs(
    checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_graphs, "LADDER", (12,))
    monkeypatch.setattr(chunk_graphs, "MAX_CHUNKS", 3)
    monkeypatch.setattr(mixed_graphs, "CHUNK_LADDER", (8,))
    alone: list[int] = []  # cached rows of each step
    merged: list[int] = []
    run, launch = ChunkGraphs.run, MixedGraphs.launch

    def counted_run(self: ChunkGraphs, batch: ForwardBatch, num_wanted: int) -> torch.Tensor:
        alone.append(sum(batch.context_len) - batch.num_tokens)
        return run(self, batch, num_wanted)

    def counted_launch(
        self: MixedGraphs, seqs: list[Sequence], places: Any, batch: ForwardBatch, num_wanted: int
    ) -> Any:
        merged.append(sum(batch.context_len) - batch.num_tokens)
        return launch(self, seqs, places, batch, num_wanted)

    monkeypatch.setattr(ChunkGraphs, "run", counted_run)
    monkeypatch.setattr(MixedGraphs, "launch", counted_launch)
    rng = random.Random(0)
    first = [rng.randrange(512) for _ in range(21)]  # two chunks; the later prompts hit two blocks of it
    prompts = [first, [*first[:9], 1, 2], [*first[:9], 3, 4, 5]]
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False, token_budget=12)
    by_graphs = build(checkpoint, device, uses_kernels=True, uses_graphs=True, token_budget=12)

    expected = answers(plain, prompts, temperature=0.0)

    assert answers(by_graphs, prompts, temperature=0.0) == expected
    assert (alone, merged) == ([0, 12], [8 + 8])


@pytest.mark.parametrize(
    ("uses_graphs", "expected"),
    [
        (False, [1, 2, 2, 1, 1]),  # nothing in the first step
        (True, [3, 3, 2 + 3, 2, 1, 1]),  # three places of chunks, and two of decodes where both go together
    ],
    ids=["eager", "graphs"],
)
def test_experts_of_the_last_layer_see_the_rows_that_are_wanted(
    checkpoint: Path, device: str, uses_graphs: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the only layer of experts. Steps: 12 of the first prompt; its 9 others; a decode and the second
    prompt; decodes."""
    if uses_graphs and device == "cuda":
        pytest.skip("a captured graph calls nobody")
    monkeypatch.setattr(chunk_graphs, "LADDER", (12,))
    monkeypatch.setattr(chunk_graphs, "MAX_CHUNKS", 3)
    monkeypatch.setattr(mixed_graphs, "CHUNK_LADDER", (8,))
    monkeypatch.setattr(mixed_graphs, "DECODE_LADDER", (2,))
    seen: list[int] = []
    between_norms = FusedMoeLayer.between_norms

    def noted(self: FusedMoeLayer, x_TD: torch.Tensor, delta_TD: torch.Tensor, *norms: Any) -> Any:
        assert x_TD.shape == delta_TD.shape
        seen.append(x_TD.shape[0])
        return between_norms(self, x_TD, delta_TD, *norms)

    monkeypatch.setattr(FusedMoeLayer, "between_norms", noted)
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (21, 7)]
    engine = build(checkpoint, device, uses_kernels=True, uses_graphs=uses_graphs, token_budget=12)

    answers(engine, prompts, temperature=0.0)

    assert seen == expected


@pytest.mark.parametrize("rows", [[14, 0, 2, 2], []])
def test_wanted_rows_by_kernels_are_those_of_a_pass_over_all(
    checkpoint: Path, device: str, rows: list[int]
) -> None:
    engine = build(checkpoint, device, uses_kernels=True, uses_graphs=False)
    model, cache = engine._runner._model, engine.kv_cache
    batch, _ = scattered_batch([3, 5], [(0, 6), (4, 7)], BLOCK_SIZE)
    batch = replace(
        batch,
        token_ids_T=torch.arange(15, device=device),
        positions_T=batch.positions_T.to(device),
        slot_mapping_T=batch.slot_mapping_T.to(device),
    )
    batch.device_plan = plan_on_device(batch, BLOCK_SIZE)

    expected_TD = model.forward(batch, cache)
    wanted_N = torch.tensor(rows, dtype=torch.int64, device=device)
    found_ND = model.forward(batch, cache, wanted_N=wanted_N)

    torch.testing.assert_close(found_ND, expected_TD[wanted_N], rtol=1e-5, atol=1e-6)


def test_constrained_rows_go_beside_plain_ones_through_the_graphs(checkpoint: Path, device: str) -> None:
    """A plain greedy row alone runs ahead; with a constrained one the step waits for its masks."""
    eos_token_id = 0
    from llguidance import LLTokenizer

    text = build_tokenizer().to_str()
    compiler = GrammarCompiler(lambda: LLTokenizer(text, n_vocab=512, eos_token=[eos_token_id]))
    letters = Grammar(kind=GrammarKind.REGEX, text="([a-f]|the baton ){30}")
    constraints: list[dict[str, Any]] = [{}, {"grammar": letters}, {"allowed_token_ids": (5, 6, 7)}, {}]

    def constrained(engine: Engine) -> dict[int, list[int]]:
        for seq_id, constraint in enumerate(constraints):
            sampling = SamplingParams(temperature=0.0, max_tokens=3 + seq_id, ignore_eos=True, **constraint)
            matcher = compiler.compile(letters).result(20) if sampling.grammar else None
            engine.add(Sequence(seq_id, [9, 8, 7, seq_id], sampling, matcher=matcher))
        found: dict[int, list[int]] = {seq_id: [] for seq_id in range(len(constraints))}
        while engine.has_work:
            for output in engine.step().outputs:
                found[output.seq_id] += output.token_ids
        return found

    expected = constrained(build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False))
    found = constrained(build(checkpoint, device, uses_kernels=True, uses_graphs=True))
    assert found == expected
    assert set(found[2]) <= {5, 6, 7}
    assert re.fullmatch("([a-f]|the baton ?)+.*", build_tokenizer().decode(found[1]))
    compiler.close()


def test_an_engine_that_only_computes_prompts_has_no_graphs_of_decodes(checkpoint: Path, device: str) -> None:
    """A chunk of one row is a decode to the model: it goes eagerly then."""
    engine = build(checkpoint, device, uses_kernels=True, uses_graphs=True, decodes=False)
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False)
    assert engine._runner.device_steps is not None and engine._runner.device_steps._decodes is None
    prompts = [[5], [7, 8, 9]]
    assert answers(engine, prompts, temperature=0.0) == answers(plain, prompts, temperature=0.0)


def test_a_warm_up_leaves_nothing_behind(
    checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "_NUM_PROMPTS", (3,))
    monkeypatch.setattr(warm_up, "_DRAWN", warm_up._DRAWN[1:])
    engine = build(checkpoint, device, uses_kernels=True, uses_graphs=True, decodes=False)
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False)
    warm_up.warm_up(engine._runner, engine.kv_cache, 6, MAX_MODEL_LEN)
    assert engine.kv_cache.data[:, :4].count_nonzero()  # it computed something
    assert not engine.cached_hashes() and not engine.has_work
    assert answers(engine, [[7, 8, 9]], temperature=0.0) == answers(plain, [[7, 8, 9]], temperature=0.0)


@pytest.fixture
def rounded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model's cache holds what one in FP8 would."""

    def write_rounded(
        cache: torch.Tensor, slots: torch.Tensor, rows_T: torch.Tensor, stored_rows: torch.Tensor | None
    ) -> None:
        rounded = dequantise_mla_rows(quantised_as_here(rows_T, RANK), RANK)
        plan.write_rows(cache, slots, rounded, stored_rows)

    monkeypatch.setattr(mla, "write_rows", write_rounded)


def logprobs(engine: Engine, prompts: list[list[int]]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and their logprobs."""
    for seq_id, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, num_logprobs=0)
        engine.add(Sequence(seq_id, prompt, sampling))
    found: dict[int, list[tuple[int, float]]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            entries = [entry.logprob for entry in output.logprobs]
            found.setdefault(output.seq_id, []).extend(zip(output.token_ids, entries, strict=True))
    tokens = [token for seq_id in range(len(prompts)) for token in found[seq_id]]
    return [token_id for token_id, _ in tokens], torch.tensor([logprob for _, logprob in tokens])


def test_decodes_over_a_cache_in_fp8_are_those_over_rounded_rows(
    checkpoint: Path, device: str, request: pytest.FixtureRequest
) -> None:
    """A prompt of one row is a decode: nothing is attended to but what the cache holds."""
    prompts = [[5], [300]]
    exact = logprobs(build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False), prompts)
    request.getfixturevalue("rounded_rows")
    rounded = logprobs(build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False), prompts)

    found = logprobs(build(checkpoint, device, uses_kernels=True, uses_graphs=False, kv_dtype="fp8"), prompts)

    assert found[0] == rounded[0]
    torch.testing.assert_close(found[1], rounded[1], rtol=0, atol=1e-4)
    assert (rounded[1] - exact[1]).abs().max() > 1e-2


def test_chunks_behind_a_cache_in_fp8_go_through_graphs(
    checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch, rounded_rows: None
) -> None:
    monkeypatch.setattr(chunk_graphs, "LADDER", (12,))
    monkeypatch.setattr(chunk_graphs, "MAX_CHUNKS", 3)
    monkeypatch.setattr(mixed_graphs, "CHUNK_LADDER", (8,))
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(21)]]  # two chunks, of which the second one meets a cache
    plain = build(checkpoint, "cpu", uses_kernels=False, uses_graphs=False, token_budget=12)
    options: dict[str, Any] = {"uses_kernels": True, "token_budget": 12, "kv_dtype": "fp8"}

    rounded = logprobs(plain, prompts)
    gathered = logprobs(build(checkpoint, device, uses_graphs=False, **options), prompts)
    by_graphs = logprobs(build(checkpoint, device, uses_graphs=True, **options), prompts)

    # A chunk's own rows are exact where they are not gathered, those of the plain model are rounded.
    for found in (gathered, by_graphs):
        assert found[0] == rounded[0]
        torch.testing.assert_close(found[1], rounded[1], rtol=0, atol=0.3)


def test_a_sequence_is_handed_over_in_fp8(checkpoint: Path, device: str) -> None:
    alone, sender, receiver = (
        build(checkpoint, device, uses_kernels=True, uses_graphs=False, kv_dtype="fp8") for _ in range(3)
    )
    prompt = [7, 8, 9, 300, 2, 5]
    alone.add(Sequence(0, prompt, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)))
    expected = run(alone)[0][0]

    listener, first = hand_off(sender, receiver, 0, prompt, 4)

    assert [*first.token_ids, *run(receiver)[0][0][-3:]] == expected
    assert listener.announced
    num_bytes = sender.kv_cache.layout.block_bytes
    assert num_bytes == 2 * BLOCK_SIZE * row_bytes(RANK, ROPE)


@pytest.mark.parametrize(("budget", "last"), [(40, []), (64, [64]), (300, [256, 300]), (9000, [7168, 8192])])
def test_the_ladder_of_chunks_ends_at_the_budget(budget: int, last: list[int]) -> None:
    assert chunk_graphs.chunk_ladder(budget)[-2:] == last


def test_the_ladder_ends_at_the_largest_batch() -> None:
    assert batch_ladder(3) == [1, 2, 3]
    assert batch_ladder(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 64]
    assert batch_ladder(400)[-3:] == [320, 384, 400]
