"""Whatever a request asks for: with drafts it gets what it gets without, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mtp_driver import VOCAB_SIZE, Recorder, build, random_prompts

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammar import Grammar, GrammarKind
from engine.outputs import FinishReason
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.fakes.tiny_tokenizer import build_tokenizer

EOS = 2
LENGTHS = (1, 16, 17, 40)
SCENARIOS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.7},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    "penalised": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
    },
    "penalised_draws": {"temperature": 0.5, "frequency_penalty": 1.5, "presence_penalty": -1.0},
    "biased": {"temperature": 0.3, "logit_bias": {7: 6.0, 8: 5.0, EOS: -100.0}},
    "logprobs": {"temperature": 0.5, "num_logprobs": 3},
    "allowed": {"temperature": 0.5, "allowed_token_ids": tuple(range(100, 130))},
    "bad_words": {
        "temperature": 0.0,
        "bad_words": ((105, 106), (107,)),
        "allowed_token_ids": (105, 106, 107),
    },
    "ends": {"temperature": 0.6, "ignore_eos": False, "logit_bias": {EOS: 7.0}},
    "ends_late": {"temperature": 0.6, "ignore_eos": False, "logit_bias": {EOS: 7.0}, "min_tokens": 9},
    "stops": {"temperature": 0.0, "stop_token_ids": frozenset(range(0, VOCAB_SIZE, 9)), "min_tokens": 4},
    "short": {"temperature": 0.0, "max_tokens": 2},
}


def run(model_dir: Path, num_speculative_tokens: int, scenario: dict[str, Any]) -> Recorder:
    engine = build(model_dir, num_speculative_tokens)
    recorder = Recorder(engine)
    for seq_id, prompt_ids in enumerate(random_prompts(LENGTHS)):
        params = {"seed": seq_id, "max_tokens": 40, "ignore_eos": True} | scenario
        recorder.add(Sequence(seq_id, prompt_ids, SamplingParams(**params)))
    return recorder.run()


@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_requests(agreeing: Path, scenario: str, num_speculative_tokens: int) -> None:
    params = SCENARIOS[scenario]
    expected = run(agreeing, 0, params)
    found = run(agreeing, num_speculative_tokens, params)
    assert found.tokens == expected.tokens
    assert found.ends == expected.ends
    for seq_id, entries in expected.logprobs.items():
        assert [entry.token_id for entry in found.logprobs[seq_id]] == [entry.token_id for entry in entries]
        for mine, theirs in zip(found.logprobs[seq_id], entries, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert mine.top_token_ids == theirs.top_token_ids
    if scenario not in ("short", "stops", "ends"):
        assert found.num_steps < expected.num_steps
    if scenario == "stops":
        assert FinishReason.STOP in found.ends.values()


@pytest.mark.parametrize("num_speculative_tokens", [1, 4])
@pytest.mark.parametrize("max_model_len", [48, 49, 50, 51])
def test_the_longest_context(agreeing: Path, max_model_len: int, num_speculative_tokens: int) -> None:
    """Just as many blocks as one sequence can have: a row beyond them would have no place."""
    found = []
    for num_drafts in (0, num_speculative_tokens):
        engine = build(
            agreeing,
            num_drafts,
            num_blocks=-(-max_model_len // 16),
            max_model_len=max_model_len,
            max_running=2,
        )
        recorder = Recorder(engine)
        for seq_id, prompt_ids in enumerate(random_prompts((30, 37))):
            recorder.add(
                Sequence(seq_id, prompt_ids, SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
            )
            recorder.run()
        found.append((recorder.tokens, recorder.ends))
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0][0].values()] == [max_model_len - 30, max_model_len - 37]


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    from llguidance import LLTokenizer

    text = build_tokenizer().to_str()
    compiler = GrammarCompiler(lambda: LLTokenizer(text, n_vocab=VOCAB_SIZE, eos_token=[EOS]))
    yield compiler
    compiler.close()


@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_grammars(
    agreeing: Path, compiler: GrammarCompiler, temperature: float, num_speculative_tokens: int
) -> None:
    """One that always holds, one that ends by itself, and one that begins after a token of free text."""
    grammars = [
        Grammar(kind=GrammarKind.REGEX, text="([a-f]|the baton ){60}"),
        Grammar(kind=GrammarKind.REGEX, text="(ab|cd){3}"),
        Grammar(kind=GrammarKind.REGEX, text="[xyz]{40}", begin_after=(105,)),
    ]
    allowed: list[tuple[int, ...]] = [(), (), (105, *range(70, 100))]
    found = []
    for num_drafts in (0, num_speculative_tokens):
        recorder = Recorder(build(agreeing, num_drafts))
        for seq_id, grammar in enumerate(grammars):
            sampling = SamplingParams(
                temperature=temperature,
                seed=seq_id,
                max_tokens=40,
                grammar=grammar,
                allowed_token_ids=allowed[seq_id],
            )
            matcher = compiler.compile(grammar).result(20)
            recorder.add(Sequence(seq_id, [9, 8, 7, seq_id], sampling, matcher=matcher))
        recorder.run()
        found.append(recorder)
    assert found[1].tokens == found[0].tokens
    assert found[1].ends == found[0].ends
    assert found[1].num_steps < found[0].num_steps
    assert build_tokenizer().decode(found[1].tokens[1]).startswith(("ab", "cd"))
