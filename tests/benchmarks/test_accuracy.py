"""benchmarks.accuracy: what it reports, and that it reads a model as a client of the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.accuracy import HELD_OUT, Scores, compare, main, read_conversations, read_pieces
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine
from engine.outputs import StepOutput


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_random_checkpoint(path, "deepseek_v3")
    return path


def test_perplexity_and_differences_are_against_the_first_mode() -> None:
    exact = Scores(np.log([0.5, 0.25, 0.125, 0.25]), np.array([1, 2, 3, 4]))
    rough = Scores(np.log([0.5, 0.25, 0.25, 0.25]), np.array([1, 2, 9, 4]))
    first, second = compare({"float32": exact, "bfloat16": rough})
    assert (first["perplexity"], first["times"], first["same likeliest token"]) == (
        "4.0000",
        "1.00000",
        "100.00%",
    )
    assert second["perplexity"] == f"{4 / 2**0.25:.4f}"
    assert second["at most"] == f"{math.log(2):.4f}"
    assert second["same likeliest token"] == "75.00%"


def test_a_text_is_cut_into_pieces_of_the_models_tokens(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one two three four five six seven eight nine ten")
    pieces = read_pieces(checkpoint, [text], 4, 100)
    assert {len(piece) for piece in pieces[:-1]} == {4}
    assert 2 <= len(pieces[-1]) <= 4
    assert len(read_pieces(checkpoint, [text], 4, 2)) == 2
    text.write_text("")
    with pytest.raises(ValueError, match="fewer than two tokens"):
        read_pieces(checkpoint, [text], 4, 1)


def test_conversations_beside_a_model_are_read_through_its_template(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    pair = {"prompt": "one", "answer": "two"}
    (tmp_path / HELD_OUT).write_text(f"{json.dumps(pair)}\n" * 3)
    pieces = read_conversations(tmp_path, 1000, 2)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert len(pieces) == 2
    text = tokenizer.decode(pieces[0], skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n")
    assert {len(piece) for piece in read_conversations(tmp_path, 4, 3)} == {4}


def test_a_token_budget_cuts_the_pieces_and_changes_no_score(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps = 0
    step = Engine.step

    def counted(engine: Engine) -> StepOutput:
        nonlocal num_steps
        num_steps += 1
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    found = []
    for options in ([], ["--token-budget", "33"]):
        num_steps = 0
        args = [str(checkpoint), "--pieces", "2", "--prompt-len", "80", "--modes", "float32", *options]
        assert main(args) == 0
        found.append((num_steps, float(capsys.readouterr().out.splitlines()[2].split("|")[2])))
    (whole_steps, whole), (cut_steps, cut) = found
    assert whole == pytest.approx(cut, rel=1e-4)
    assert whole_steps <= 2 < 5 <= cut_steps


def test_kv_in_fp8_is_not_scored_where_nothing_is_read_from_the_cache(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--modes", "bfloat16", "fp8kv"])
    assert "needs a --token-budget below --prompt-len" in capsys.readouterr().err


def test_bfloat16_is_close_to_float32_and_not_the_same(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint), "--pieces", "2", "--prompt-len", "48"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    times, difference = float(rows[1][2]), float(rows[1][3])
    assert float(rows[0][3]) == 0.0
    assert 0.0 < difference < 0.2
    assert times == pytest.approx(1.0, abs=0.1)
    assert int(rows[0][6]) == 2 * 47
