from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_model import training
from tools.demo_model.student import Student, StudentConfig
from tools.demo_model.texts import Corpus, encode
from tools.demo_model.training import Progress, TrainingPlan, train

PLAN = TrainingPlan(seconds=150, rows=4, row_tokens=48, steps_between_logs=1)
ANSWERS = {"fox": "The fox is red.", "owl": "The owl is wise.", "bear": "The bear is big."}


@pytest.fixture
def corpus(tokenizer: Tokenizer, small: StudentConfig) -> Corpus:
    pairs = [(f"Tell me about the {name}.", answer) for name, answer in ANSWERS.items()] * 8
    corpus = encode(pairs, tokenizer)
    # A small vocabulary is quicker to learn: the words keep apart.
    kinds, tokens = corpus.tokens.unique(return_inverse=True)
    assert len(kinds) < small.vocab_size
    return replace(corpus, tokens=tokens.int())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at it is a second: so many steps on any machine."""
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_a_small_corpus_is_learned_by_both_heads(corpus: Corpus, small: StudentConfig) -> None:
    student = Student(small)
    found: list[Progress] = []
    train(student, corpus, PLAN, found.append)
    assert not student.training
    assert [progress.step for progress in found] == list(range(1, len(found) + 1))
    assert found[0].tokens == 4 * 48
    assert found[0].loss > 5
    assert found[-1].loss < 0.3 * found[0].loss
    assert found[-1].mtp_loss < 0.3 * found[0].mtp_loss
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert any(experts.bias_E.any() for experts in student.moe_layers())


def test_too_little_text_is_refused(corpus: Corpus, small: StudentConfig) -> None:
    with pytest.raises(ValueError, match="at least 8192 are needed"):
        train(Student(small), corpus, TrainingPlan(seconds=1, rows=4, row_tokens=1024), lambda _: None)


def test_rows_begin_where_documents_do_and_every_epoch_is_in_another_order(corpus: Corpus) -> None:
    batches = training._batches(corpus, PLAN, torch.device("cpu"))
    firsts = set(corpus.tokens[corpus.starts].tolist())
    rows = []
    for tokens, is_target in itertools.islice(batches, 6):
        assert tokens.shape == is_target.shape == (PLAN.rows, PLAN.row_tokens)
        assert set(tokens[:, 0].tolist()) <= firsts
        assert not is_target[:, 0].any()
        rows += tokens.tolist()
    assert len(set(map(tuple, rows))) > PLAN.rows
